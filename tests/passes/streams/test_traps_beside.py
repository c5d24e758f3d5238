"""Sums beside a stream: positions, biases and values that are added for one consumer alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnres_fx.passes import analyze_
from tests.support.stream_text import captured

WIDTH = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, q, k, v):
        return self.out(F.scaled_dot_product_attention(self.q(q), self.k(k), self.v(v)))


class Net(nn.Module):
    """Modules enough for two layers; `program(net, *inputs)` says how they are used."""

    def __init__(self, program):
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.attentions = nn.ModuleList(Attention() for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(8))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, *args):
        return self.program(self, *args)


def post_norm(m, x, positions):
    for i in range(2):
        q = x + positions
        x = m.norms[2 * i](x + m.attentions[i](q, q, x))
        x = m.norms[2 * i + 1](x + m.layers[i](x))
    return x


def positions_first(m, x, positions):
    for i in range(2):
        q = positions + x
        x = m.norms[2 * i](m.attentions[i](q, q, x) + x)
        x = m.norms[2 * i + 1](x + m.layers[i](x))
    return x


def pre_norm(m, x, positions):
    for i in range(2):
        h = m.norms[2 * i](x)
        q = h + positions
        x = x + m.attentions[i](q, q, h)
        x = x + m.layers[i](m.norms[2 * i + 1](x))
    return m.norms[4](x)


def projected_positions(m, x, positions):
    """The content is projected by each layer, the positions once for all; they are also looked at by themselves."""
    shared = m.layers[3](positions)
    for i in range(3):
        q = m.layers[i](x) + shared
        x = m.norms[i](x + m.attentions[i](q, q, x))
    return x + 0 * shared.mean(), m.layers[3](shared)


def shared_bias(m, x, positions):
    bias = positions @ positions.mT
    for i in range(3):
        h = m.layers[i](m.norms[i](x))
        x = x + (h @ h.mT + bias).softmax(-1) @ h
    return m.norms[3](x), bias.mean(-1)


def time_embedding(m, x, time):
    """What is added belongs to the branch; the stream itself is read through it."""
    for i in range(3):
        x = x + m.layers[i](m.norms[i](x + time)).tanh()
    return m.norms[3](x)


def value_residual(m, x, _):
    first = None
    for i in range(4):
        h = m.norms[i](x)
        v = m.layers[i](h)
        first = v if first is None else first
        x = x + m.attentions[i](h, h, 0.5 * v + 0.5 * first)
    return m.norms[4](x)


@pytest.mark.parametrize(
    "program, reads",
    [
        (post_norm, 4),
        (positions_first, 4),
        (pre_norm, 4),
        (projected_positions, 3),
        (shared_bias, 3),
        (time_embedding, 3),
        (value_residual, 4),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("spelling", ["export", "dynamo"])
@pytest.mark.slow_after(1)
def test_what_is_added_for_one_consumer_is_no_stream(program, reads, spelling):
    args = (torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH))
    streams = analyze_(captured(Net(program).eval(), args, spelling))
    assert [len(s.depth_reads) for s in streams.select("main")] == [reads]


def test_queries_and_keys_that_read_each_other_are_two_streams_and_their_positions_none():
    """A two-way decoder: the queries begin as the positions that are added to them."""

    def program(m, image, where, points):
        q, k = points, image
        for i in range(2):
            a = q + points
            q = m.norms[4 * i](q + m.attentions[2 * i](a, k + where, k))
            q = m.norms[4 * i + 1](q + m.layers[i](q))
            k = m.norms[4 * i + 2](k + m.attentions[2 * i + 1](k + where, q + points, q))
        return m.norms[7](q + m.attentions[3](q + points, k + where, k)), k

    args = (torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH))
    streams = analyze_(captured(Net(program).eval(), args, "export"))
    assert [[r.name for r in s.depth_reads] for s in streams.streams] == [
        ["norms.0", "norms.1", "norms.4", "norms.5", "norms.7"],
        ["norms.2", "norms.6"],
    ]
    assert all(s.is_main for s in streams.streams)
