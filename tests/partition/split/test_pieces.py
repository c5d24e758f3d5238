"""Pieces of one operation, taken by layers of several stages: the tensors travel, their list or tuple never does."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from tests.support.cutting import assert_same, cut, spread

WIDTH, LAYERS = 8, 3

PIECES = {
    "chunk": lambda v: v.chunk(LAYERS, -1),
    "split": lambda v: v.split(WIDTH, -1),
    "unbind": lambda v: v.unflatten(-1, (LAYERS, WIDTH)).unbind(-2),
    "nested": lambda v: [half.sum(-1, keepdim=True) for part in v.chunk(LAYERS, -1) for half in part.chunk(2, -1)],
    "sort": lambda v: (v.sort(-1).values[..., :WIDTH], v.sort(-1).indices[..., :WIDTH] / 10, v[..., :WIDTH]),
    "var_mean": lambda v: (*torch.var_mean(v, -1, keepdim=True), v[..., :WIDTH]),
}


class Net(nn.Module):
    """Each layer takes its piece of what is made at the top, from the arguments or from the first layer's output."""

    def __init__(self, pieces, of_stream):
        super().__init__()
        self.pieces, self.of_stream = pieces, of_stream
        self.embed, self.values = nn.Embedding(50, WIDTH), nn.Embedding(50, LAYERS * WIDTH)
        self.made = nn.Linear(WIDTH, LAYERS * WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, ids):
        x = self.embed(ids)
        if self.of_stream:
            x = x + self.layers[0](x).tanh()
        pieces = self.pieces(self.made(x) if self.of_stream else self.values(ids))
        for layer, piece in zip(self.layers, pieces, strict=False):
            x = x + layer(x).tanh() * piece
        return x


@pytest.mark.parametrize("of_stream", [False, True])
@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.slow_after(1)
def test_pieces_cross_a_cut(kind, of_stream):
    torch.manual_seed(0)
    kwargs = {"ids": torch.randint(0, 50, (2, 5))}
    converted = spread(ax.convert(Net(PIECES[kind], of_stream), kwargs=kwargs, check=False))
    count = converted.report.streams[0].stream.num_sublayers
    stages = cut(converted, tuple(range(count)))
    assert_same(converted, stages, kwargs)


class Modulated(nn.Module):
    """A diffusion transformer's layer: shift, scale and gate of each half are pieces of one product."""

    def __init__(self):
        super().__init__()
        self.modulations = nn.ModuleList(nn.Linear(WIDTH, 6 * WIDTH) for _ in range(2))
        self.attentions, self.mlps = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def forward(self, x, c):
        for modulation, attention, mlp in zip(self.modulations, self.attentions, self.mlps, strict=True):
            a, b, g, d, e, h = modulation(nn.functional.silu(c))[:, None].chunk(6, -1)
            x = x + g * attention(self.norm(x) * (1 + b) + a)
            x = x + h * mlp(self.norm(x) * (1 + e) + d)
        return x


def test_a_modulated_transformer_is_cut_anywhere():
    torch.manual_seed(0)
    kwargs = {"x": torch.randn(2, 5, WIDTH), "c": torch.randn(2, WIDTH)}
    converted = spread(ax.convert(Modulated(), kwargs=kwargs, check=False))
    assert_same(converted, cut(converted, (0, 1, 2, 3)), kwargs)
