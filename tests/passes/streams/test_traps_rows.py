"""Rows that are spread, moved, joined again or written into keep their sources (design section 4)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnres_fx as ax
from attnres_fx.passes import analyze_
from tests.support.stream_text import SPELLINGS, assert_near, captured, check_preserved, found_text, tokens, toy

INDEX = torch.tensor([1])
EVERY = torch.arange(4).reshape(2, 2)
MASK = (torch.arange(10).reshape(2, 5) % 3 == 0).unsqueeze(-1)


def between(what):
    """One layer, something, and one layer more."""

    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = what(m, h)
        h = h + m.attn_2(m.norm_3(h))
        return m.head(m.norm_f(h))

    return program


def written(write):
    """The same with a copy that may be written into."""

    def what(m, h):
        h = h.clone()
        write(m, h)
        return h

    return what


def assigned(m, h):
    h[:, :1] = h[:, :1] + m.mlp_1(m.norm_2(h[:, :1]))


def assigned_by_index(m, h):
    h[INDEX] = h[INDEX] + m.mlp_1(m.norm_2(h[INDEX]))


def added_to_rows(m, h):
    h[:, 2:] += m.mlp_1(m.norm_2(h))[:, 2:]


def class_token(m, h):
    first = h[:, :1]
    first = first + m.mlp_1(m.norm_2(h)).mean(1, keepdim=True)
    return torch.cat([first, h[:, 1:]], 1)


def subset_of_the_batch(m, h):
    f = m.mlp_1(m.norm_2(h[INDEX]))
    return torch.index_add(h.flatten(1), 0, INDEX, f.flatten(1), alpha=2.0).view_as(h)


#: What leaves every row where it was.
UNCHANGED = {
    "cat of slices": lambda m, h: torch.cat([h[:, :2], h[:, 2:]], 1),
    "split": lambda m, h: torch.cat([h.split([2, 3], 1)[0], h.split([2, 3], 1)[1]], dim=1),
    "chunks of features": lambda m, h: torch.cat((h.chunk(2, -1)[0], h.chunk(2, -1)[1]), -1),
    "unbind and stack": lambda m, h: torch.stack([h.unbind(0)[0], h.unbind(0)[1]]),
    "picks and runs": lambda m, h: torch.cat((h[:, 0].unsqueeze(1), h.narrow(1, 1, 3), h[:, -1][:, None]), 1),
    "cat of a cat": lambda m, h: torch.cat((h[:, :1], torch.cat([h[:, 1:][:, :2], h[:, 1:][:, 2:]], 1)), 1),
    "heads": lambda m, h: torch.cat([h.view(2, 5, 2, 4)[:, :, :1], h.view(2, 5, 2, 4)[:, :, 1:]], 2).view(2, 5, 8),
}
#: What adds to rows, or puts others in their place: a sublayer of its own.
WRITTEN = {
    "a branch of [B, 1, D]": lambda m, h: h + m.mlp_1(m.norm_2(h).mean(1, keepdim=True)),
    "a branch of [B, D]": lambda m, h: m.mlp_1(m.norm_2(h).mean(1))[:, None] + h,
    "a branch of [D]": lambda m, h: h - m.mlp_1(m.norm_2(h)).mean((0, 1)),
    "a mean": lambda m, h: h + m.norm_2(h).mean(1, keepdim=True),
    "cat with a sum": lambda m, h: torch.cat([h[:, :2], h[:, 2:] + m.mlp_1(m.norm_2(h[:, 2:]))], 1),
    "cat of two sums": lambda m, h: torch.cat(
        [h[:, :2] - m.mlp_2(m.norm_2(h))[:, :2], m.mlp_1(h)[:, 2:] + h[:, 2:]], 1
    ),
    "a class token that is added to": class_token,
    "a class token in the place of another": lambda m, h: torch.cat([m.mlp_1(m.norm_2(h[:, :1])), h[:, 1:]], 1),
    "a subset of the batch": subset_of_the_batch,
    "slices assigned": written(assigned),
    "rows added to in place": written(added_to_rows),
    "rows assigned by index": written(assigned_by_index),
    "index_copy": lambda m, h: h.index_copy(0, INDEX, h[INDEX] + m.mlp_1(m.norm_2(h[INDEX]))),
    "index_put": lambda m, h: h.index_put((INDEX,), m.mlp_1(m.norm_2(h[INDEX])), accumulate=True),
    "a pooled token before the tokens": lambda m, h: torch.cat([m.mlp_1(h.mean(1, keepdim=True)), h * 2], 1),
    "slice_scatter": lambda m, h: torch.slice_scatter(h, m.mlp_1(m.norm_2(h[:, 1:])), 1, 1),
}


#: What brings new rows into a stream: a term that is zero elsewhere, here part of the sublayer before.
NEW = {
    "a class token before the tokens": lambda m, h: torch.cat([m.carry.expand(2, 1, 8), h], 1),
    "tokens on both sides": lambda m, h: torch.cat([m.positions.weight[:3].expand(2, 3, 8), h, m.embed(EVERY)], 1),
    "where": lambda m, h: torch.where(MASK, m.carry, h),
    "the other side of where": lambda m, h: torch.where(~MASK, h * 0.5, m.mlp_1.bias),
    "a fill of some rows": lambda m, h: h.masked_fill(MASK, 0.5),
}
#: What repeats rows or puts zeros beside them: no term.
MORE = {
    "zeros behind the tokens": lambda m, h: F.pad(h, (0, 0, 0, 3)),
    "zeros before the tokens": lambda m, h: torch.cat([h.new_zeros(2, 1, 8), h], 1),
    "each row twice": lambda m, h: h.repeat_interleave(2, 1),
    "the batch twice": lambda m, h: h.repeat(2, 1, 1),
    "unbind and stack": lambda m, h: torch.stack(h.unbind(1), 1),
    "split and cat": lambda m, h: torch.cat(h.split(2, 1), 1),
}
#: What is read and not added to: a sublayer, and no new rows in the stream.
READ = {
    "a join for one branch": lambda m, h: h + m.mlp_1(m.norm_2(torch.cat([m.carry.expand(2, 1, 8), h], 1)))[:, 1:],
    "a mask for one branch": lambda m, h: h + m.mlp_1(m.norm_2(h.masked_fill(MASK, 0.5))),
}


def reads_in(text):
    """How many streams there are, and the positions of all reads."""
    lines = text.splitlines()
    streams = [line for line in lines if line.startswith("stream ")]
    return len(streams), [int(line.split(" reads ")[1].split()[0]) for line in lines if " reads " in line]


def check(what, positions, spellings=("dynamo", "export")):
    program = between(what)
    model = toy(program)
    for spelling in spellings:
        assert reads_in(found_text(model, (tokens(),), spelling)) == (1, positions), spelling
    for variant in ("full", "local"):
        config = ax.AttnResConfig(variant=variant, block_size=1 if variant == "local" else None)
        source = torch.export.export(model, (tokens(),))
        check_preserved(model, ax.convert(source, (tokens(),), config=config, check=False), (tokens(),), where=variant)


@pytest.mark.parametrize("way", UNCHANGED)
@pytest.mark.slow_after(2)
def test_rows_that_are_put_together_again_are_what_they_were(way):
    check(UNCHANGED[way], [1, 2])


@pytest.mark.parametrize("way", WRITTEN)
@pytest.mark.slow_after(4)
def test_what_is_written_into_some_rows_is_a_term(way):
    text = found_text(toy(between(WRITTEN[way])), (tokens(),), "export")
    assert reads_in(text)[1][-2:] == [2, 3]
    check(WRITTEN[way], reads_in(text)[1])


@pytest.mark.parametrize("way", NEW)
def test_new_rows_in_a_stream_are_a_term(way):
    text = found_text(toy(between(NEW[way])), (tokens(),), "export")
    assert " + " in text.splitlines()[1], text  # what was written before, and the new rows
    check(NEW[way], [1, 2], SPELLINGS)


@pytest.mark.parametrize("way", MORE)
def test_rows_that_are_repeated_or_have_zeros_beside_them_keep_their_sources(way):
    check(MORE[way], [1, 2], SPELLINGS)


@pytest.mark.parametrize("way", READ)
def test_what_is_joined_or_masked_for_a_branch_is_a_read(way):
    check(READ[way], [1, 2, 3], SPELLINGS)


@torch.no_grad()
@pytest.mark.parametrize("way", ["a class token before the tokens", "where"])
def test_with_random_queries_new_rows_are_what_the_definition_says(way):
    model = toy(between(NEW[way]))
    config = ax.AttnResConfig(variant="full")
    converted = ax.convert(torch.fx.symbolic_trace(model), (tokens(),), config=config, check=False)
    generator = torch.Generator().manual_seed(1)
    q = {read.name: read.query.normal_(generator=generator) for read in converted.attnres.reads}
    nothing = torch.zeros(2, 5, 8)
    v_0 = model.embed(tokens())
    v_1 = model.attn_1(model.norm_1(v_0))
    if way == "where":
        kept = [torch.where(MASK, nothing, v) for v in (v_0, v_1)]
        new = torch.where(MASK, model.carry, nothing)
    else:
        kept = [torch.cat([nothing[:, :1], v], 1) for v in (v_0, v_1)]
        new = torch.cat([model.carry.expand(2, 1, 8), nothing], 1)
    sources = [kept[0], kept[1] + new]
    sources.append(model.attn_2(model.norm_3(mixed(sources, q["norm_3"]))))
    assert_near(converted(tokens()), model.head(model.norm_f(mixed(sources, q["norm_f"]))), 1e-5)


def test_a_mean_that_is_taken_off_is_no_term():
    for centred in (lambda m, h: h - h.mean(1, keepdim=True), lambda m, h: h + (-h).mean(1)[:, None]):
        text = found_text(toy(between(centred)), (tokens(),), "export")
        assert "mean" not in text.replace("norm", "") and "  3:" not in text


def test_a_class_token_that_is_read_before_it_is_joined_has_its_reads():
    def what(m, h):
        first = h[:, :1]
        first = first + m.mlp_1(m.norm_2(h)).mean(1, keepdim=True)
        first = first + m.mlp_2(m.norm_4(first))
        return torch.cat([first, h[:, 1:]], 1)

    check(what, [1, 2, 3, 4], ("symbolic", "dynamo", "export"))


def test_what_takes_nothing_but_replaced_rows_is_no_read_of_the_stream():
    """A class token of another stream in the place of a stream's own, as in CrossViT: h is read with it by a norm."""

    def what(m, h):
        token = m.mlp_1(m.norm_2(h[:, :1]))
        joined = torch.cat([token, h[:, 1:]], 1)
        token = joined[:, :1] + m.mlp_2(m.norm_4(joined)).mean(1, keepdim=True)
        return torch.cat([m.mlp_3(token.tanh()), h[:, 1:]], 1)

    for spelling in SPELLINGS:
        gm = captured(toy(between(what)), (tokens(),), spelling)
        streams = analyze_(gm).streams
        roots = [s.root.module for s in streams]
        assert [len(s.depth_reads) for s in streams if s.is_main] == [4], spelling
        assert "mlp_1" in roots, (spelling, roots)  # the token and what is added to it
    check_preserved(
        toy(between(what)), ax.convert(toy(between(what)), (tokens(),), check=False), (tokens(),), gradients=False
    )


LANES_END = ("norm_f", "norm_4")


def test_what_only_another_stream_takes_in_is_beside_the_chain():
    """Two lanes whose class tokens visit each other: the tokens that were visited are the stream's, the guest none."""

    def program(m, x):
        a, b = m.embed(x), m.positions(x)
        for norm, mix in ((m.norm_1, m.attn_1), (m.norm_3, m.attn_3)):
            a, b = a + mix(norm(a)), b + m.attn_2(m.norm_2(b))
            sent, guest = m.mlp_1(a[:, :1].tanh()), m.mlp_1(b[:, :1].tanh())
            back = m.mlp_2(sent + m.mlp_4(torch.cat([sent, b[:, 1:]], 1)).mean(1, keepdim=True))
            updated, met = torch.cat([back, a[:, 1:]], 1), torch.cat([guest, a[:, 1:]], 1)
            seen = guest + m.mlp_4(met).mean(1, keepdim=True)
            a, b = updated, torch.cat([m.mlp_3(seen.tanh()), b[:, 1:]], 1)
        return m.head(m.norm_f(a)) + m.head(m.norm_4(b))

    for spelling in SPELLINGS:
        streams = analyze_(captured(toy(program), (tokens(),), spelling)).select("main")
        ends = [next(r for r in s.depth_reads if r.name == name) for s, name in zip(streams, LANES_END, strict=True)]
        assert [(r.position, r.extras) for r in ends] == [(4, ()), (4, ())], spelling


def mixed(sources, query):
    """The paper's read, written by hand: mode "sum", key gains of one."""
    stack = torch.stack(sources)
    keys = stack * torch.rsqrt(stack.square().mean(-1, keepdim=True) + 1e-6)
    return len(sources) * ((keys @ query).softmax(0).unsqueeze(-1) * stack).sum(0)


@torch.no_grad()
def test_with_random_queries_rows_are_what_the_definition_says():
    model = toy(between(lambda m, h: torch.cat([m.mlp_1(m.norm_2(h[:, :1])), h[:, 1:]], 1)))
    config = ax.AttnResConfig(variant="full")
    converted = ax.convert(torch.fx.symbolic_trace(model), (tokens(),), config=config, check=False)
    generator = torch.Generator().manual_seed(1)
    q = {read.name: read.query.normal_(generator=generator) for read in converted.attnres.reads}
    v_0 = model.embed(tokens())
    v_1 = model.attn_1(model.norm_1(v_0))
    first = model.mlp_1(model.norm_2(mixed([v_0, v_1], q["norm_2"])[:, :1]))
    v_2 = torch.cat([first, torch.zeros_like(v_0[:, 1:])], 1)
    kept = [torch.cat([torch.zeros_like(v[:, :1]), v[:, 1:]], 1) for v in (v_0, v_1)]
    v_3 = model.attn_2(model.norm_3(mixed([*kept, v_2], q["norm_3"])))
    expected = model.head(model.norm_f(mixed([*kept, v_2, v_3], q["norm_f"])))
    assert_near(converted(tokens()), expected, 1e-5)


class Shuffled(nn.Module):
    """Convolutions over a batch whose rows are picked by an index before every layer; the width is in dimension 1."""

    def __init__(self):
        super().__init__()
        self.mixes = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.register_buffer("order", torch.tensor([1, 0]))

    def forward(self, x):
        for mix, norm in zip(self.mixes, self.norms, strict=False):
            x = x[self.order]
            x = x + mix(norm(x)).tanh()
        return self.norms[-1](x)


@pytest.mark.parametrize("spelling", ["export", "dynamo"])
def test_rows_picked_by_an_index_keep_their_sources_where_the_width_is_not_last(spelling):
    (stream,) = analyze_(captured(Shuffled().eval(), (torch.randn(2, 6, 5, 5),), spelling)).streams
    assert [r.position for r in stream.depth_reads] == [1, 2, 3]
    assert (stream.width, stream.dimension) == (6, 1)
