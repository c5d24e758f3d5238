"""Which streams are the main ones: skips around a stack, streams inside sublayers, lanes side by side."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.passes import analyze_
from tests.support.stream_text import captured, check_preserved

WIDTH, LAYERS = 8, 3


class Net(nn.Module):
    def __init__(self, program):
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.mixes = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(LAYERS)
        )
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.carry = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x):
        return self.program(self, x)


def stack(m, x):
    for norm, mix in zip(m.norms, m.mixes, strict=False):
        x = x + mix(norm(x))
    return m.norms[LAYERS](x)


def normalised_and_undone(m, x):
    mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    return m.head(stack(m, m.embed((x - mean) / scale))) * scale + mean


def skip_around_everything(m, x):
    return x + m.head(stack(m, m.embed(x)))


def two_skips(m, x):
    y = m.embed(x)
    return x + m.head(y + m.layers[0](stack(m, m.norms[-1](y))))


@pytest.mark.parametrize("program", [normalised_and_undone, skip_around_everything, two_skips])
def test_a_skip_around_a_stack_does_not_hide_it(program):
    model, x = Net(program).eval(), torch.randn(2, 5, 4)
    converted = ax.convert(model, (x,), config=ax.AttnResConfig(variant="full"))
    assert converted.attnres.reads.names == ("norms.1", "norms.2", "norms.3")
    assert {r.query.numel() for r in converted.attnres.reads} == {WIDTH}
    assert any("a skip around" in why for _, why in converted.report.left)
    check_preserved(model, converted, (x,))


def residual_inside(m, x):
    """Every sublayer is a residual of its own; the stack is what is as deep as the model."""
    x = m.embed(x)
    for norm, layer in zip(m.norms, m.layers, strict=False):
        y = norm(x)
        x = x + (y + layer(y))
    return m.norms[-1](x)


def aggregator(m, x):
    """`x + agg(x)` before each layer's own work."""
    x = m.embed(x)
    for norm, layer, mix in zip(m.norms, m.layers, m.mixes, strict=False):
        y = norm(x)
        y = y + layer(y.mean(1, keepdim=True).expand_as(y))
        x = x + mix(y)
    return m.norms[-1](x)


def shared_value(m, x):
    """The first layer's value is added to that of every later one."""
    x, first = m.embed(x), None
    for norm, layer, mix in zip(m.norms, m.layers, m.mixes, strict=False):
        v = layer(norm(x))
        first = v if first is None else first
        x = x + mix(m.carry * v + (1 - m.carry) * first)
    return m.norms[-1](x)


@pytest.mark.parametrize("program", [residual_inside, aggregator, shared_value])
def test_what_stands_inside_the_sublayers_is_not_main(program):
    streams = analyze_(captured(Net(program).eval(), (torch.randn(2, 5, 4),), "export"))
    (main,) = streams.select("main")
    assert [r.name for r in main.depth_reads] == ["norms.1", "norms.2", f"norms.{2 * LAYERS}"]
    assert {s.nested_in for s in streams.streams if s is not main} == {main.name}


def test_a_sum_of_all_sublayers_that_is_read_once_does_not_hide_the_post_norm_stream_beside_it():
    """ResiDual: what a layer writes is added to the normed stream, and to a sum that only the last norm reads."""

    def program(m, x):
        h = both = m.embed(x)
        for i in range(LAYERS):
            written = m.mixes[i](h)
            h, both = m.norms[i](h + written), both + written
        return m.head(h + m.norms[-1](both))

    for spelling in ("symbolic", "export", "dynamo"):
        streams = analyze_(captured(Net(program).eval(), (torch.randn(2, 5, 4),), spelling))
        (main,) = streams.select("main")
        assert main.post_norm, spelling
        assert [r.name for r in main.depth_reads] == ["norms.1", "norms.2"], spelling
        assert [s.around for s in streams.streams] == [main.name, None], spelling


def reversible(m, x):
    left, right = m.embed(x), m.embed(x.flip(-1))
    for i in range(LAYERS):
        left = left + m.layers[i](m.norms[2 * i](right))
        right = right + m.mixes[i](m.norms[2 * i + 1](left))
    return m.head(m.norms[-1](torch.cat([left, right], 1)))


def read_by_hand(sources, read):
    """`S` times the softmax over depth of the sources (arXiv 2603.15031, section 3)."""
    values = torch.stack(sources)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * read.key_weight
    return len(sources) * ((keys @ read.query).softmax(0).unsqueeze(-1) * values).sum(0)


def test_each_of_two_lanes_reads_the_sources_of_its_own_lane():
    model, x = Net(reversible).eval(), torch.randn(2, 5, 4)
    converted = ax.convert(model, (x,), config=ax.AttnResConfig(variant="full"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for read in converted.attnres.reads:
            read.query.normal_(generator=generator)
    reads = dict(zip(converted.attnres.reads.names, converted.attnres.reads, strict=True))
    # The left lane's first sum holds nothing that was computed from its own beginning: it is the root.
    left, right = [model.embed(x) + model.layers[0](model.norms[0](model.embed(x.flip(-1))))], [model.embed(x.flip(-1))]

    def mixed(lane, name):
        return read_by_hand(lane, reads[name]) if len(lane) > 1 else lane[0]

    for i in range(LAYERS):
        if i:
            left.append(model.layers[i](model.norms[2 * i](mixed(right, f"norms.{2 * i}"))))
        right.append(model.mixes[i](model.norms[2 * i + 1](mixed(left, f"norms.{2 * i + 1}"))))
    (last,) = reads.keys() - {f"norms.{i}" for i in range(2 * LAYERS)}
    # What the last branch reads of the left lane is its end as well.
    expected = torch.cat([mixed(left, f"norms.{2 * LAYERS - 1}"), mixed(right, last)], 1)
    torch.testing.assert_close(converted(x), model.head(model.norms[-1](expected)))
