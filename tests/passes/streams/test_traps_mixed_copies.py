"""Hyper-connections are refused by name in every spelling; independent copies and skips of a stream are sums."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.passes import analyze_
from tests.support.stream_text import captured

WIDTH, COPIES, LAYERS = 8, 3, 2


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS))
        self.dynamic = nn.ModuleList(nn.Linear(WIDTH, COPIES + 1) for _ in range(LAYERS))
        self.static = nn.ParameterList(nn.Parameter(torch.randn(COPIES, COPIES + 1)) for _ in range(LAYERS))
        self.beta = nn.ParameterList(nn.Parameter(torch.randn(COPIES, 1)) for _ in range(LAYERS))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x):  # [batch, tokens, width]
        x = x[:, :, None].repeat(1, 1, COPIES, 1)
        for i in range(LAYERS):
            x = self.layer(self, i, x)
        return self.last(x.sum(2))

    def weights(self, i, x):
        return self.dynamic[i](self.norms[i](x)).tanh() + self.static[i]

    def written(self, i, taken):
        return self.branches[i](taken).unsqueeze(2) * self.beta[i]


def one_product(m, i, x):
    mixed = torch.einsum("btcm,btcd->btmd", m.weights(i, x), x)
    return mixed[..., 1:, :] + m.written(i, mixed[..., 0, :])


def split(m, i, x):
    taken, carried = (m.weights(i, x).transpose(-1, -2) @ x).split([1, COPIES], 2)
    return carried + m.written(i, taken.squeeze(2))


def fixed_weights(m, i, x):
    mixed = torch.einsum("cm,btcd->btmd", m.static[i], x)
    return m.written(i, mixed[..., 0, :]) + mixed[..., 1:, :]


def two_products(m, i, x):
    weights = m.weights(i, x)
    taken = torch.einsum("btc,btcd->btd", weights[..., 0], x)
    return torch.einsum("btcm,btcd->btmd", weights[..., 1:], x) + m.written(i, taken)


def product_and_sum(m, i, x):
    mixed = (m.weights(i, x).unsqueeze(-1) * x.unsqueeze(-2)).sum(2)
    return mixed[:, :, 1:] + m.written(i, mixed[:, :, 0])


def sinkhorn(m, i, x):
    weights = m.weights(i, x)
    matrix = weights[..., 1:].exp()
    for _ in range(2):
        matrix = matrix / matrix.sum(-1, keepdim=True)
        matrix = matrix / matrix.sum(-2, keepdim=True)
    return torch.matmul(matrix, x) + m.written(i, (weights[..., :1].sigmoid() * x).sum(2))


def unbound(m, i, x):
    taken, *carried = torch.einsum("btcm,btcd->btmd", m.weights(i, x), x).unbind(2)
    written = m.branches[i](taken)
    return torch.stack([c + written * m.beta[i][j] for j, c in enumerate(carried)], 2)


def batched(m, i, x):
    weights = m.weights(i, x).flatten(0, 1).mT
    mixed = torch.bmm(weights, x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return mixed.narrow(2, 1, COPIES) + m.written(i, mixed.select(2, 0))


def added_in_the_product(m, i, x):
    weights, flat = m.weights(i, x).flatten(0, 1).mT, x.flatten(0, 1)
    written = m.branches[i](torch.bmm(weights[:, :1], flat)) * m.beta[i]
    return torch.baddbmm(written, weights[:, 1:], flat).unflatten(0, x.shape[:2])


def listed(m, i, x):
    copies, weights = x.unbind(2), m.weights(i, x).unbind(2)
    written = m.branches[i](sum(w[..., :1] * c for w, c in zip(weights, copies, strict=True)))
    mixed = [sum(w[..., k + 1 : k + 2] * c for w, c in zip(weights, copies, strict=True)) for k in range(COPIES)]
    return torch.stack([c + m.beta[i][k] * written for k, c in enumerate(mixed)], 2)


SPELLINGS = [
    *(one_product, split, fixed_weights, two_products, product_and_sum, sinkhorn, unbound, batched),
    *(added_in_the_product, listed),
]


def found(model, spelling="export"):
    return analyze_(captured(model.eval(), (torch.randn(2, 5, WIDTH),), spelling))


@pytest.mark.parametrize("layer", SPELLINGS, ids=lambda layer: layer.__name__)
def test_mixed_copies_are_refused_by_name(layer):
    streams = found(Net(layer))
    assert any(r.stops_conversion and "hyper-connections" in r.reason for r in streams.refusals), streams.refusals


def test_a_conversion_of_them_raises():
    with pytest.raises(ax.errors.NotAdditiveError, match="hyper-connections"):
        ax.convert(Net(one_product).eval(), (torch.randn(2, 5, WIDTH),))


class Lists(Net):
    """Copies in a list, mixed with fixed weights: a weighted sum of sums, and no stream all the same."""

    def forward(self, x):
        copies = [x] * COPIES
        for i in range(LAYERS):
            w = self.static[i]
            written = self.branches[i](sum(w[j, 0] * c for j, c in enumerate(copies)))
            copies = [
                sum(w[j, k + 1] * c for j, c in enumerate(copies)) + self.beta[i][k] * written for k in range(COPIES)
            ]
        return self.last(sum(copies))


def test_copies_in_a_list_are_refused_by_name_too():
    assert any("hyper-connections" in r.reason for r in found(Lists(None)).refusals)


class Skips(Net):
    """Two earlier states come back with weights: merges of one lane with its own past."""

    def forward(self, x):
        kept = []
        for i in range(LAYERS):
            x = x + self.branches[i](self.norms[i](x))
            kept.append(x)
        for i in range(LAYERS):
            x = x + self.beta[i][0] * kept.pop()
            x = x + self.branches[i](self.norms[i](x))
        return self.last(x)


def independent(m, i, x):
    return x + m.branches[i](m.norms[i](x))


@pytest.mark.parametrize("model, reads", [(Net(independent), 2), (Skips(None), 4)], ids=["copies", "skips"])
def test_independent_copies_and_skips_are_sums(model, reads):
    streams = found(model)
    assert [len(s.depth_reads) for s in streams.streams] == [reads] and not streams.refusals
