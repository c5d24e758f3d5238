"""Plain values outside the model that forward reads: of the environment, and of objects that are arguments."""

import math

import pytest
import torch
from torch import nn

import attnres_fx as ax

WIDTH = 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x, options=None):
        for mix in self.mixes:
            x = x + mix(x).tanh() * self.scale(options)
        return x


class ByName(Net):
    def scale(self, _):
        import os

        return float(os.environ.get("ATTNRES_TEST_SCALE", "1"))


class Options:
    def __init__(self, scale):
        self.scale = scale
        self.inner = [scale]


class ByAttribute(Net):
    def scale(self, options):
        return options.scale


class ByEntry(Net):
    def scale(self, options):
        return options.inner[0]


def test_the_environment_of_now_is_read(monkeypatch):
    monkeypatch.setenv("ATTNRES_TEST_SCALE", "0.5")
    model, x = ByName(), torch.randn(2, 3, WIDTH)
    converted = ax.convert(model, (x,), check=False)
    for value in ("0.5", "2.0"):
        monkeypatch.setenv("ATTNRES_TEST_SCALE", value)
        torch.testing.assert_close(converted(x), model(x))
    monkeypatch.delenv("ATTNRES_TEST_SCALE")
    torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("kind", [ByAttribute, ByEntry])
def test_an_object_that_is_an_argument_may_be_changed_in_place(kind):
    model, x, options = kind(), torch.randn(2, 3, WIDTH), Options(0.5)
    converted = ax.convert(model, (x, options), check=False)
    for scale in (0.5, 2.0):
        options.scale = options.inner[0] = scale
        torch.testing.assert_close(converted(x, options), model(x, options))
    other = Options(0.25)
    torch.testing.assert_close(converted(x, other), model(x, other))
    torch.testing.assert_close(converted(x, options), model(x, options))


def test_a_zero_of_another_sign_is_another_argument():
    model, x = ByAttribute(), torch.randn(2, 3, WIDTH)
    model.scale = lambda sign: math.copysign(0.5, sign)
    converted = ax.convert(model, (x, 0.0), check=False)
    torch.testing.assert_close(converted(x, -0.0), model(x, -0.0))
    torch.testing.assert_close(converted(x, 0.0), model(x, 0.0))
