"""How far a conversion may be from its original: by the coarsest dtype that reads are computed in."""

import contextlib

import pytest
import torch
from torch import nn

import attnres_fx as ax

BF16 = torch.bfloat16


class Tower(nn.Module):
    """Parameters and outputs in float32; between them what `inside` casts to."""

    def __init__(self, inside=contextlib.nullcontext):
        super().__init__()
        self.inside = inside
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(7))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(6))

    def forward(self, x):
        with self.inside():
            x = self.layers[0](x)
            for norm, layer in zip(self.norms, self.layers, strict=False):
                x = x + layer(norm(x))
            return self.layers[0](self.norms[-1](x)).float()


def autocast():
    return torch.autocast("cpu", BF16)


@pytest.mark.parametrize("inside, around", [(autocast, contextlib.nullcontext), (contextlib.nullcontext, autocast)])
def test_what_is_computed_in_bfloat16_may_differ_by_bfloat16(inside, around):
    torch.manual_seed(0)
    model, x = Tower(inside), torch.randn(4, 8, 32)
    with around():
        report = ax.verify(model, ax.convert(model, (x,)), (x,))
    assert report.passed
    assert report.worst > 1e-3  # an error, were it held to what float32 allows
    assert {d.tolerance for d in report.outputs} == {8e-2}


@pytest.mark.slow
def test_what_is_computed_in_float32_is_held_to_float32():
    model, x = Tower(), torch.randn(4, 8, 32)
    converted = ax.convert(model, (x,))
    exact = ax.verify(model, converted, (x,))
    assert exact.passed and {d.tolerance for d in exact.differences} == {1e-5, 1e-4}
    with autocast():
        assert ax.verify(model, converted, (x,)).passed
    cast = ax.verify(model.to(BF16), converted.to(BF16), (x.to(BF16),))  # whose output is float32 all the same
    assert cast.passed and {d.tolerance for d in cast.outputs} == {8e-2}


def test_a_low_precision_beside_the_stream_loosens_nothing():
    class Masked(Tower):
        def forward(self, x):
            keep = torch.ones(x.shape[1], dtype=BF16).cumsum(0) > 2
            return super().forward(x * keep[:, None])

    model, x = Masked(), torch.randn(4, 8, 32)
    report = ax.verify(model, ax.convert(model, (x,)), (x,))
    assert {d.tolerance for d in report.differences} == {1e-5, 1e-4}


def test_outputs_in_half_precision_are_multiplied_as_the_stream_is():
    class Scaled(Tower):
        def forward(self, x):
            for norm, layer in zip(self.norms, self.layers, strict=False):
                x = (x + layer(norm(x)).to(BF16)) * 0.83
            return self.norms[-1](x)

    model, x = Scaled(), torch.randn(4, 8, 32)
    converted = ax.convert(model, (x,), config=ax.AttnResConfig(variant="full"), check=False)
    assert ax.verify(model, converted, (x,)).worst < 1e-5
