"""Python state that a call changes: Dynamo changes it, so attach takes the models that convert refuses."""

import copy

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import CaptureError


class Counting(nn.Module):
    """Counts its calls, keeps what its branches gave, and adds it up."""

    def __init__(self, width=8):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.calls, self.sizes = 0, []

    def forward(self, x):
        self.calls += 1
        self.sizes = []
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            branch = mix(norm(x))
            self.sizes.append(branch.square().mean())
            x = x + branch
        return x, torch.stack(self.sizes).sum()


def test_python_state_of_a_compiled_model_is_the_originals():
    torch.manual_seed(0)
    model = Counting()
    original = copy.deepcopy(model)
    ax.compile(model, (torch.randn(2, 5, 8),), inner="eager")
    assert (model.calls, model.sizes) == (0, [])
    for sizes in ((2, 5), (3, 4), (2, 2)):
        x = torch.randn(*sizes, 8)
        torch.testing.assert_close(model(x), original(x))
        assert model.calls == original.calls
        torch.testing.assert_close(model.sizes, original.sizes)


def test_a_converted_model_has_no_python_to_keep_it_in():
    with pytest.raises(CaptureError, match=r"use ax\.compile"):
        ax.convert(Counting(), (torch.randn(2, 5, 8),))
