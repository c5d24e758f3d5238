"""Python state that a model's forward writes: what is made once, what goes on, and arguments that are left out."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import CaptureError

WIDTH = 8


class TableOfALength(nn.Module):
    """Makes its table anew when the length is another."""

    def __init__(self):
        super().__init__()
        self.length, self.table = 0, None

    def forward(self, length):
        if length != self.length:
            self.length = length
            self.table = torch.cos(torch.arange(length, dtype=torch.float32))[:, None] + 0.01 * length
        return self.table


class GrowingTable(nn.Module):
    """Makes a longer table when it needs one."""

    def __init__(self):
        super().__init__()
        self.table = None

    def forward(self, length):
        if self.table is None or self.table.shape[0] < length:
            self.table = torch.cos(torch.arange(length, dtype=torch.float32))[:, None]
        return self.table[:length]


class Net(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.rotary = table()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, scale=1.0):
        table = self.rotary(x.shape[1])
        for norm, mix in zip(self.norms, self.mixes, strict=False):
            x = x + scale * mix(norm(x) * table)
        return self.norms[3](x)


@pytest.mark.parametrize("ran_before", [None, 12, 9])
@pytest.mark.parametrize("table", [TableOfALength, GrowingTable])
def test_every_length_is_right_whatever_ran_before(table, ran_before):
    torch.manual_seed(0)
    model = Net(table).eval()
    if ran_before is not None:
        model(torch.randn(2, ran_before, WIDTH))
    original = copy.deepcopy(model)
    converted = ax.convert(model, (torch.randn(2, 12, WIDTH),))
    for length in (7, 12, 9, 12, 1, 15, 12, 3):
        x = torch.randn(2, length, WIDTH)
        torch.testing.assert_close(converted(x), original(x))


def test_the_report_names_what_a_first_call_sets():
    converted = ax.convert(Net(TableOfALength).eval(), (torch.randn(2, 12, WIDTH),))
    assert any("rotary.length" in note and "first call sets it" in note for note in converted.report.notes)


def test_a_model_that_was_used_is_followed():
    model = Net(TableOfALength).eval()
    converted = ax.convert(model, (torch.randn(2, 12, WIDTH),))
    for length in (5, 12, 7):
        x = torch.randn(2, length, WIDTH)
        torch.testing.assert_close(converted(x), model(x))


def test_state_that_goes_on_is_refused_by_name():
    class Counting(Net):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    with pytest.raises(CaptureError, match=r"calls: 1 -> 2"):
        ax.convert(Counting(GrowingTable), (torch.randn(2, 5, WIDTH),))


def test_an_argument_that_is_left_out_means_its_default():
    model, x = Net(GrowingTable).eval(), torch.randn(2, 5, WIDTH)
    converted = ax.convert(model, (x,), {"scale": 0.5})
    torch.testing.assert_close(converted(x, scale=0.5), model(x, scale=0.5))
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(converted(x, scale=2.0), model(x, 2.0))


def test_what_is_converted_in_inference_mode_can_be_trained():
    model = Net(GrowingTable).train()
    with torch.inference_mode():
        converted = ax.convert(model, (torch.randn(2, 5, WIDTH),))
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(converted(x), model(x))
    converted(x).square().sum().backward()
    assert converted.attnres.reads[-1].query.grad is not None


@pytest.mark.parametrize("value", [np.float64(2.5), np.full((8,), 2.5, dtype=np.float32)])
def test_a_numpy_value_among_the_arguments_is_named_with_what_to_pass_instead(value):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
            self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x, scale):
            if not isinstance(scale, float | torch.Tensor):
                scale = torch.as_tensor(scale)
            for norm, mix in zip(self.norms, self.mixes, strict=True):
                x = x + mix(norm(x)) * scale
            return x

    model, x = Scaled(), torch.randn(2, 5, 8)
    with pytest.raises(CaptureError, match=r"argument holds a numpy value.*torch\.as_tensor"):
        ax.convert(model, (x, value))
    for given in (torch.as_tensor(value), 2.5):
        converted = ax.convert(model, (x, given))
        torch.testing.assert_close(converted(x, given), model(x, given))
