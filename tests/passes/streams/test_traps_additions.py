"""Every spelling of an addition to a stream, one after another or in parallel (design section 4)."""

import operator

import pytest
import torch

import attnres_fx as ax
from tests.support.stream_text import TWO_LAYERS, check_trap, found_text, rows, tokens, toy


def two_layers(add):
    """A pre-norm model of one attention and one MLP whose residual additions are spelled by `add`."""

    def program(m, x):
        h = m.embed(x)
        h = add(h, m.attn_1(m.norm_1(h)))
        h = add(h, m.mlp_1(m.norm_2(h)))
        return m.head(m.norm_f(h))

    return program


ADDITIONS = {
    "h + f": lambda h, f: h + f,
    "f + h": lambda h, f: f + h,
    "h - f": lambda h, f: h - f,
    "f - h": lambda h, f: f - h,
    "torch.add": lambda h, f: torch.add(h, f),
    "torch.add by keyword": lambda h, f: torch.add(input=h, other=f),
    "torch.add alpha": lambda h, f: torch.add(h, f, alpha=0.5),
    "torch.add alpha on the state": lambda h, f: torch.add(f, h, alpha=0.5),
    "torch.sub alpha": lambda h, f: torch.sub(h, f, alpha=0.25),
    "torch.rsub": lambda h, f: torch.rsub(h, f),
    "h.add": lambda h, f: h.add(f),
    "h.sub": lambda h, f: h.sub(f),
    "iadd": lambda h, f: operator.iadd(h, f),
    "isub": lambda h, f: operator.isub(h, f),
    "add_": lambda h, f: h.add_(f),
    "add_ alpha": lambda h, f: h.add_(f, alpha=2),
    "sub_": lambda h, f: h.sub_(f),
    "add_ on the branch": lambda h, f: f.add_(h),
    "sum": lambda h, f: sum([h, f]),
    "sum, branch first": lambda h, f: sum([f, h]),
}


@pytest.mark.parametrize("spelling", ADDITIONS)
@pytest.mark.slow_after(1)
def test_every_spelling_of_an_addition_extends_the_stream(spelling):
    check_trap(two_layers(ADDITIONS[spelling]), (tokens(),), TWO_LAYERS)


def test_addmm_with_the_state_as_addend_is_a_residual():
    def program(m, x):
        h = x
        h = torch.addmm(h, m.norm_1(h), m.attn_1.weight)
        h = torch.addmm(h, m.norm_2(h), m.mlp_1.weight, beta=0.5, alpha=2.0)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from input
          1: mm
          2: mm
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (rows()[0],), expected)


def test_baddbmm_with_the_state_as_addend_is_a_residual():
    def program(m, x):
        h = x
        h = torch.baddbmm(h, m.norm_1(h), m.attn_1.weight.expand(2, -1, -1))
        h = h.baddbmm(m.norm_2(h), m.mlp_1.weight.expand(2, -1, -1), beta=1, alpha=0.5)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from input
          1: bmm
          2: bmm
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (rows(),), expected)


def test_addcmul_with_the_state_as_addend_is_a_residual():
    def program(m, x):
        h = m.embed(x)
        h = torch.addcmul(h, m.carry, m.attn_1(m.norm_1(h)))
        h = h.addcmul(m.carry, m.mlp_1(m.norm_2(h)), value=0.5)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: mul
          2: mul
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(),), expected)


def test_a_bias_as_addend_of_addmm_is_no_residual():
    def program(m, x):
        y = torch.addmm(m.attn_1.bias, x, m.attn_1.weight)
        return torch.addmm(m.mlp_1.bias, y, m.mlp_1.weight)

    check_trap(program, (rows()[0],), "no stream")


ORDERS = {
    "(h + a) + b": lambda h, a, b: (h + a) + b,
    "(a + h) + b": lambda h, a, b: (a + h) + b,
    "(h + b) + a": lambda h, a, b: (h + b) + a,
    "(b + h) + a": lambda h, a, b: (b + h) + a,
    "b + (h + a)": lambda h, a, b: b + (h + a),
    "a + (b + h)": lambda h, a, b: a + (b + h),
    "(a + b) + h": lambda h, a, b: (a + b) + h,
    "h + (a + b)": lambda h, a, b: h + (a + b),
    "(b + a) + h": lambda h, a, b: (b + a) + h,
    "h += a; h += b": lambda h, a, b: operator.iadd(operator.iadd(h, a), b),
    "h += a + b": lambda h, a, b: operator.iadd(h, a + b),
    "sum": lambda h, a, b: sum([h, a, b]),
    "sum, state last": lambda h, a, b: sum([a, b, h]),
}


@pytest.mark.parametrize("norms", ["one norm", "two norms"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.slow_after(1)
def test_parallel_attention_and_mlp_are_one_sublayer_in_any_order(order, norms):
    add = ORDERS[order]

    def program(m, x):
        h = m.embed(x)
        for norm, other, attn, mlp in (
            (m.norm_1, m.norm_2, m.attn_1, m.mlp_1),
            (m.norm_3, m.norm_4, m.attn_2, m.mlp_2),
        ):
            a = attn(norm(h))
            h = add(h, a, mlp(other(h) if norms == "two norms" else norm(h)))
        return m.head(m.norm_f(h))

    model = toy(program)
    for spelling in ("symbolic", "export", "dynamo"):
        lines = found_text(model, (tokens(),), spelling).splitlines()
        assert len([line for line in lines if line.startswith("stream")]) == 1, (spelling, lines)
        assert [line for line in lines if "reads" in line] == ["  norm_3 reads 1", "  norm_f reads 2"], spelling
    text = found_text(model, (tokens(),), "symbolic")
    check_trap(program, (tokens(),), text, spellings=("symbolic",))


WEIGHTS = torch.tensor([0.5, 1.5])
CHANNELS = torch.linspace(0.5, 1.5, 16).reshape(2, 8)
OTHER_WORDS = {
    "sum of a stack": lambda h, f: torch.stack([h, f]).sum(0),
    "sum of a stack along another dimension": lambda h, f: torch.stack((f, h), dim=2).sum(dim=2),
    "sum of a cat": lambda h, f: torch.cat([h[None], f.unsqueeze(0)]).sum(0),
    "mean of a cat": lambda h, f: torch.cat([h[:, None], f[:, None]], 1).mean(1),
    "weighted stack": lambda h, f: (torch.stack([h, f]) * WEIGHTS[:, None, None, None]).sum(0),
    "stack with weights of channels": lambda h, f: (CHANNELS * torch.stack([h, f], 2)).sum(2),
    "weighted stack, one factor for all": lambda h, f: (torch.stack([h, f]) * WEIGHTS[0]).sum(0),
    "tensordot": lambda h, f: torch.tensordot(WEIGHTS, torch.stack([h, f]), 1),
    "tensordot the other way": lambda h, f: torch.tensordot(torch.stack([h, f], 1), WEIGHTS, ([1], [0])),
    "einsum": lambda h, f: torch.einsum("l,lbtd->btd", WEIGHTS, torch.stack([h, f])),
    "einsum of channels": lambda h, f: torch.einsum("btld,ld->btd", torch.stack([h, f], 2), CHANNELS),
    "einsum with an ellipsis": lambda h, f: torch.einsum("...l, l -> ...", torch.stack([h, f], -1), WEIGHTS),
    "matmul": lambda h, f: torch.stack([h, f], -1) @ WEIGHTS,
    "lerp with a constant weight": lambda h, f: torch.lerp(h, f, 0.3),
    "lerp by method": lambda h, f: h.lerp(f, 0.5),
    "lists of tensors": lambda h, f: torch._foreach_add([h], [f])[0],
}


@pytest.mark.parametrize("words", OTHER_WORDS)
def test_an_addition_in_other_words_extends_the_stream(words):
    def program(m, x):
        h = m.embed(x)
        h = OTHER_WORDS[words](h, m.attn_1(m.norm_1(h)))
        h = OTHER_WORDS[words](h, m.mlp_1(m.norm_2(h)))
        return m.head(m.norm_f(h))

    for spelling in ("symbolic", "export", "dynamo"):
        text = found_text(toy(program), (tokens(),), spelling)
        assert "norm_2 reads 1" in text and "norm_f reads 2" in text, spelling
    assert ax.verify(toy(program), ax.convert(toy(program), (tokens(),)), (tokens(),)).passed


SCATTERED = {
    "index_add": lambda h, i, f: h.index_add(1, i[0, :, 0], f),
    "scatter_add": lambda h, i, f: h.scatter_add(1, i, f),
    "index_add_": lambda h, i, f: h.clone().index_add_(1, i[0, :, 0], f),
}


@pytest.mark.parametrize("how", SCATTERED)
def test_what_is_scattered_into_the_stream_is_a_term(how):
    index = torch.tensor([0, 2, 3])[None, :, None].expand(2, 3, 8)

    def program(m, x):
        h = m.embed(x)
        h = SCATTERED[how](h, index, m.attn_1(m.norm_1(h).gather(1, index)))
        h = SCATTERED[how](h, index, m.mlp_1(m.norm_2(h).gather(1, index)))
        return m.head(m.norm_f(h))

    model = toy(program)
    converted = ax.convert(model, (tokens(),), config=ax.AttnResConfig(variant="full"))
    assert [r.name for r in converted.attnres.reads] == ["norm_2", "norm_f"]
    assert ax.verify(model, converted, (tokens(),)).passed


@pytest.mark.parametrize("flipped", [False, True])
def test_a_branch_that_is_added_to_some_rows_alone_is_a_term(flipped):
    chosen = (torch.arange(10).reshape(2, 5) % 3 > 0)[..., None]

    def added(h, f):
        return torch.where(~chosen, h, h - f) if flipped else torch.where(chosen, f + h, h)

    def program(m, x):
        h = m.embed(x)
        h = added(h, m.attn_1(m.norm_1(h)))
        h = added(h, m.mlp_1(m.norm_2(h)))
        return m.head(m.norm_f(h))

    expected = TWO_LAYERS.replace("1: attn_1", "1: where").replace("2: mlp_1", "2: where")
    check_trap(program, (tokens(),), expected)
