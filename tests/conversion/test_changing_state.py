"""Buffers and attributes that grow, are made by a call, change their size or are taken away between calls."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import CaptureError
from tests.support.ways_in import check_same

WIDTH = 8


def example(length=4, batch=2):
    return torch.randn(batch, length, WIDTH)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        for mix in self.mixes:
            x = x + mix(x).tanh()
        return x


def a_buffer_that_grows(m, x):
    m.table = torch.cat([m.table, x.detach().mean((0, 1))[None]])
    for i in range(2):
        x = x + m.branch(i, x) + m.table.mean(0)
    return m.norms[-1](x)


def a_buffer_registered_again(m, x):
    m.register_buffer("ema", m.ema * 0.9 + x.detach().mean((0, 1)))
    for i in range(2):
        x = x + m.branch(i, x) + m.ema
    return m.norms[-1](x)


@pytest.mark.parametrize("program", [a_buffer_that_grows, a_buffer_registered_again], ids=lambda p: p.__name__)
def test_a_buffer_is_replaced_at_every_call(program):
    check_same(program, "module")


class Grows(Net):
    """A table of positions, made longer where a call needs it."""

    def __init__(self, *, persistent=False):
        super().__init__()
        self.persistent = persistent
        self.make(2)

    def make(self, length):
        self.made = length
        table = torch.arange(length * WIDTH).view(length, WIDTH).cos()
        self.register_buffer("table", table, persistent=self.persistent)

    def forward(self, x):
        if x.shape[1] > self.made:
            self.make(x.shape[1])
        return super().forward(x + self.table[: x.shape[1]])


class Masked(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None, persistent=False)

    def forward(self, x):
        if self.mask is None or self.mask.shape[0] != x.shape[1]:
            self.mask = torch.ones(x.shape[1], x.shape[1]).tril()
        return super().forward(x + self.mask @ x)


@pytest.mark.parametrize("kind", [Grows, Masked])
def test_a_table_that_a_call_makes_longer_is_made_in_one_graph_for_all_lengths(kind):
    model = kind()
    converted = ax.convert(model, (example(),))
    for length in (4, 7, 5, 3, 7):
        x = example(length)
        torch.testing.assert_close(converted(x), model(x))
    assert not converted._attnres_conversion.further
    assert any("table" in note or "mask" in note for note in converted.report.notes)


def test_a_table_of_the_state_that_a_call_makes_longer_is_refused_by_name():
    with pytest.raises(CaptureError, match="stores in the buffer table, which is part of its state"):
        ax.convert(Grows(persistent=True), (example(),), check=False)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_the_first_call_registers_is_registered(persistent):
    class Registers(Net):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.arange(WIDTH).float(), persistent=persistent)
            return super().forward(x + self.table)

    model, x = Registers(), example()
    converted = ax.convert(model, (x,), check=False)
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(dict(converted.named_buffers())["table"], model.table)
    assert ("table" in converted.state_dict()) == ("table" in model.state_dict()) == persistent


class Extra(Net):
    def forward(self, x):
        return super().forward(x if self.extra is None else x + self.extra.sum(0) / self.extra.shape[0] ** 2)


@pytest.mark.parametrize("given", ["buffer", "attribute"])
def test_what_a_graph_takes_from_the_model_may_change_its_size_or_go(given):
    model, x = Extra(), example()
    if given == "buffer":
        model.register_buffer("extra", torch.randn(3, WIDTH))
    else:
        model.extra = torch.randn(3, WIDTH)
    converted = ax.convert(model, (x,), check=False)
    for extra in (torch.randn(2, WIDTH), None):
        for net in (model, converted):
            net.extra = extra
        torch.testing.assert_close(converted(x), model(x))


def test_a_parameter_may_go():
    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x):
            return super().forward(x if self.scale is None else x * self.scale)

    model, x = Scaled(), example()
    converted = ax.convert(model, (x,), check=False)
    model.scale = converted.scale = None
    torch.testing.assert_close(converted(x), model(x))


class Losses(Net):
    """A list made anew at each call and filled with what the caller reads."""

    def forward(self, x):
        self.aux = []
        for mix in self.mixes:
            x = x + mix(x).tanh()
            self.aux.append(x.square().mean())
        return x


def test_a_list_of_losses_is_refused_by_its_name():
    with pytest.raises(CaptureError, match="Return what aux holds from forward, or store each tensor in an attribute"):
        ax.convert(Losses(), (example(),), check=False)


def test_a_compiled_model_fills_its_list_of_losses():
    model, x = Losses(), example()
    y, expected = model(x), model.aux
    ax.compile(model, (x,), inner="eager")
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(model.aux, expected)
