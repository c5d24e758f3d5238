"""Sums over time are no streams over depth, whatever they are made of; layers that take a slice each are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnres_fx.passes import analyze_
from tests.support.stream_text import captured

WIDTH, LENGTH = 8, 4


class Mixer(nn.Module):
    """A sublayer that goes over the tokens one after another."""

    def __init__(self, loop):
        super().__init__()
        self.loop = loop
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gates, self.norm = nn.Linear(2 * WIDTH, 4 * WIDTH), nn.LayerNorm(WIDTH)
        self.spread = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return self.out(torch.stack(self.loop(self, x), 1))


class Stack(nn.Module):
    def __init__(self, loop, layers=2):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers + 1))
        self.mixers = nn.ModuleList(Mixer(loop) for _ in range(layers))

    def forward(self, x):
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + mixer(norm(x))
        return self.norms[-1](x)


def delta_rule(m, x):
    q, k, v, w = m.q(x), F.normalize(m.k(x), dim=-1), m.v(x), torch.sigmoid(m.q(x))
    state, rows = torch.zeros(x.shape[0], WIDTH, WIDTH), []
    for t in range(LENGTH):
        key = k[:, t, :, None]
        state = state * w[:, t, None, :] - state @ key @ key.mT + v[:, t, :, None] @ key.mT
        rows.append((state @ q[:, t, :, None])[..., 0])
    return rows


def delta_rule_unbound(m, x):
    state, rows = x.new_zeros(x.shape[0], WIDTH, WIDTH), []
    for q, k, v in zip(m.q(x).unbind(1), m.k(x).unbind(1), m.v(x).unbind(1), strict=True):
        removed = torch.einsum("bij,bj->bi", state, k)
        state = state + torch.einsum("bi,bj->bij", v - removed, k)
        rows.append(torch.einsum("bij,bj->bi", state, q))
    return rows


def residual_rnn(m, x):
    h = x[:, 0]
    rows = [h]
    for t in range(1, LENGTH):
        h = h + torch.tanh(m.q(x[:, t]) + m.k(h))
        rows.append(h)
    return rows


def post_norm_rnn(m, x):
    h, rows = x.new_zeros(x.shape[0], WIDTH), []
    for token in x.split(1, 1):
        h = m.norm(h + torch.tanh(m.q(token.squeeze(1)) + m.k(h)))
        rows.append(h)
    return rows


def leaky_rnn(m, x):
    h, rows, u = x[:, 0], [], m.v(x)
    for t in range(LENGTH):
        h = 0.5 * h + m.q(torch.tanh(u[:, t] * h))
        rows.append(h)
    return rows


def lstm(m, x):
    h = c = x.new_zeros(x.shape[0], WIDTH)
    rows = []
    for t in range(LENGTH):
        i, f, o, g = m.gates(torch.cat([x[:, t], h], -1)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        rows.append(h)
    return rows


def test_time_training(m, x):
    k, v, q = m.k(x), m.v(x), m.q(x)
    fast, rows = torch.eye(WIDTH).expand(x.shape[0], WIDTH, WIDTH), []
    for t in range(LENGTH):
        error = k[:, t : t + 1] @ fast - v[:, t : t + 1]
        fast = fast - 0.1 * k[:, t : t + 1].mT @ error
        rows.append((q[:, t : t + 1] @ fast).squeeze(1))
    return rows


test_time_training.__test__ = False  # the name of the method


def chunks(m, x):
    q, k, v = (f(x).view(-1, LENGTH, 1, WIDTH) for f in (m.q, m.k, m.v))
    state, rows = x.new_zeros(x.shape[0], WIDTH, WIDTH), []
    for i in range(LENGTH):
        rows += (q[:, i] @ state).unbind(1)
        state = state + k[:, i].mT @ (v[:, i] - k[:, i] @ state)
    return rows


def rows_selected(m, x):
    h, rows = x.new_zeros(x.shape[0], WIDTH), []
    for t in range(LENGTH):
        h = h + torch.tanh(m.q(x.index_select(1, torch.tensor([t])).squeeze(1)) + m.k(h))
        rows.append(h)
    return rows


def rows_picked(m, x):
    h, rows = x.new_zeros(x.shape[0], WIDTH), []
    for t in range(LENGTH):
        h = h + torch.tanh(m.q(x[:, torch.tensor([t])].squeeze(1)) + m.k(h))
        rows.append(h)
    return rows


def steps_behind_a_convolution(m, x):
    u, h, rows = m.spread(x.mT), x.new_zeros(x.shape[0], WIDTH), []
    for t in range(LENGTH):
        h = h + torch.tanh(m.q(u[..., t]) + m.k(h))
        rows.append(h)
    return rows


def found(model, *args):
    streams = analyze_(captured(model.eval(), args, "export"))
    return [len(s.depth_reads) for s in streams.streams], {r.kind for r in streams.refusals}


LOOPS = [
    delta_rule,
    delta_rule_unbound,
    residual_rnn,
    post_norm_rnn,
    leaky_rnn,
    lstm,
    test_time_training,
    chunks,
    rows_selected,
    rows_picked,
    steps_behind_a_convolution,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_sum_over_time_is_no_stream_of_any_kind(loop):
    reads, kinds = found(Stack(loop), torch.randn(2, LENGTH, WIDTH))
    assert reads == [2]
    assert kinds == {"recurrence"}  # and nothing is added inside the sublayers of what is no stream


class OverSteps(nn.Module):
    """A sum over the steps of an input that has no features: tokens, or a series of numbers."""

    def __init__(self):
        super().__init__()
        self.embed, self.into, self.again = nn.Embedding(11, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = torch.zeros(x.shape[0], WIDTH)
        for t in range(LENGTH):
            step = self.into(x[:, t : t + 1]) if x.is_floating_point() else self.embed(x[:, t])
            h = h + torch.tanh(self.again(h) + step)
        return h


@pytest.mark.parametrize("x", [torch.arange(8).reshape(2, LENGTH), torch.ones(2, LENGTH)], ids=["tokens", "series"])
def test_a_sum_over_the_steps_of_an_input_without_features_is_no_stream(x):
    assert found(OverSteps(), x) == ([], {"recurrence"})


class Sliced(nn.Module):
    """Layers that take what was computed for all of them at once, a slice each."""

    def __init__(self, shared, dim):
        super().__init__()
        self.all, self.shared, self.dim = nn.Linear(WIDTH, 3 * WIDTH), shared, dim
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        parts = self.all(x)
        parts = parts.chunk(3, -1) if self.dim == -1 else parts.unflatten(-1, (3, WIDTH)).unbind(2)
        for i in range(3):
            j = 0 if self.shared else i
            x = x + self.layers[j](self.norms[j](x)) * parts[i]
        return self.norms[-1](x)


@pytest.mark.parametrize("shared, dim", [(False, -2), (True, -1), (False, -1)])
def test_layers_with_a_slice_each_are_a_stream(shared, dim):
    reads, kinds = found(Sliced(shared, dim), torch.randn(2, LENGTH, WIDTH))
    assert (reads, kinds) == ([3], set())


def test_a_layer_called_again_and_again_is_a_stream():
    class Universal(Sliced):
        def forward(self, x):
            for _ in range(3):
                x = x + self.layers[0](self.norms[0](x))
            return self.norms[-1](x)

    assert found(Universal(True, -1), torch.randn(2, LENGTH, WIDTH)) == ([3], set())


class Focal(nn.Module):
    """Contexts of growing size, each weighted by a feature of its own: no steps of time, wherever the features are."""

    def __init__(self, levels, first):
        super().__init__()
        self.levels, self.first = levels, first
        features = 2 * WIDTH + levels + 1
        self.all = nn.Conv1d(WIDTH, features, 1) if first else nn.Linear(WIDTH, features)
        self.focus = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(levels))

    def forward(self, x):
        parts = self.all(x.mT) if self.first else self.all(x).mT
        query, context, gates = parts.split((WIDTH, WIDTH, self.levels + 1), 1)
        total = 0
        for i, focus in enumerate(self.focus):
            context = F.gelu(focus(context))
            total = total + context * gates[:, i : i + 1]
        total = total + context.mean(2, keepdim=True) * gates[:, -1:]
        return (query * total).mT


@pytest.mark.parametrize("levels, first", [(1, False), (2, False), (2, True), (3, True)])
def test_features_that_weigh_a_sum_are_no_steps(levels, first):
    model = Stack(None)
    model.mixers = nn.ModuleList(Focal(levels, first) for _ in range(2))
    streams = analyze_(captured(model.eval(), (torch.randn(2, LENGTH, WIDTH),), "export"))
    assert [len(s.depth_reads) for s in streams.select("main")] == [2]
    assert streams.refusals == ()
