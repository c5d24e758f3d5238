"""A symbolic trace calls modules, which keep the training flags that they were traced with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace

import attnres_fx as ax

WIDTH = 8


class Normed(nn.Module):
    """Layers with running statistics; `always_drops` writes a dropout that is on in every mode."""

    def __init__(self, always_drops):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.always_drops = always_drops

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = torch.tanh(layer(norm(x)))
            x = x + (F.dropout(y, 1e-9, True) if self.always_drops else y)
        return x


@pytest.mark.parametrize("always_drops", [True, False])
@pytest.mark.parametrize("frozen", [(0, 1, 2), (1,), ()], ids=str)
def test_called_modules_keep_their_flags(always_drops, frozen):
    model = Normed(always_drops).train()
    for i in frozen:
        model.norms[i].eval()
    if len(frozen) == 3:
        model.eval()
    trace = symbolic_trace(model)
    converted = ax.convert(trace, (torch.randn(4, WIDTH),))
    x = torch.randn(4, WIDTH)
    for _ in range(2):
        assert torch.equal(converted(x), trace(x))
