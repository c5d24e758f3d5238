"""What a forward leaves behind outside the modules: refused by name, and nothing of the caller's is changed."""

import types

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import CaptureError

WIDTH = 4
LOG: list[torch.Tensor] = []
COUNTS = {"calls": 0}
TABLE = torch.zeros(WIDTH)


class Net(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.plain = types.SimpleNamespace(loss=None)
        self.nested = {"seen": []}
        self.held = [torch.zeros(WIDTH)]

    def body(self, x):
        for mix in self.mixes:
            x = x + mix(x).tanh()
        return x

    def forward(self, x, store=None):
        return self.body(x)


class GlobalList(Net):
    def forward(self, x):
        LOG.append(x.mean())
        return self.body(x)


class GlobalDict(Net):
    def forward(self, x):
        COUNTS["calls"] += 1
        return self.body(x)


class GlobalTensor(Net):
    def forward(self, x):
        TABLE.add_(1.0)
        return self.body(x * TABLE)


class ClassCounter(Net):
    def forward(self, x):
        type(self).calls += 1
        return self.body(x)


class PlainObject(Net):
    def forward(self, x):
        x = self.body(x)
        self.plain.loss = x.mean()
        return x


class NestedList(Net):
    def forward(self, x):
        x = self.body(x)
        self.nested["seen"].append(x.mean())
        return x


class HeldInList(Net):
    def forward(self, x):
        self.held[0] = self.held[0] + x.detach().mean((0, 1))
        return self.body(x * (1 + self.held[0]))


def held_outside(model):
    plain = vars(model.plain).copy()
    held = [t.clone() for t in model.held]
    return list(LOG), dict(COUNTS), TABLE.tolist(), type(model).calls, plain, list(model.nested["seen"]), held


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (GlobalList, "LOG"),
        (GlobalDict, "COUNTS"),
        (GlobalTensor, "globals"),
        (ClassCounter, "calls: 0 -> 1|calls: 1 -> 2"),
        (PlainObject, "plain"),
        (NestedList, r"nested\['seen'\]"),
        (HeldInList, "held"),
    ],
)
def test_what_is_kept_outside_the_modules_is_refused_by_name_and_left_as_it_was(kind, named):
    model = kind()
    before = held_outside(model)
    with pytest.raises(CaptureError, match=named):
        ax.convert(model, (torch.randn(2, 3, WIDTH),))
    assert str(held_outside(model)) == str(before)


def test_a_hook_that_stores_what_it_sees_is_refused_by_the_line_that_stores_it():
    model, seen = Net(), {}
    model.mixes[1].register_forward_hook(lambda mod, args, out: seen.update(h=out.detach()))
    with pytest.raises(CaptureError, match=r"test_outside_state.py:\d+.*seen.update"):
        ax.convert(model, (torch.randn(2, 3, WIDTH),), check=False)
    assert seen == {}


def test_a_hook_may_store_what_it_sees_in_its_module():
    model = Net()
    model.mixes[1].register_forward_hook(lambda mod, args, out: setattr(mod, "seen", out.detach()))
    x = torch.randn(2, 3, WIDTH)
    converted = ax.convert(model, (x,))
    model(x), converted(x)
    torch.testing.assert_close(converted.mixes[1].seen, model.mixes[1].seen)


def test_an_argument_that_is_filled_is_refused_and_left_empty():
    class Filling(Net):
        def forward(self, x, store):
            store["x"] = x * 2
            return self.body(x)

    store = {}
    with pytest.raises(CaptureError, match="argument 1"):
        ax.convert(Filling(), (torch.randn(2, 3, WIDTH), store))
    assert store == {}


def test_what_a_first_call_sets_from_its_data_is_refused_and_converts_once_it_is_set():
    class SetsScale(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", None)

        def forward(self, x):
            if self.scale is None:
                self.scale = x.detach().abs().mean((0, 1))
            return self.body(x / self.scale)

    model, x = SetsScale(), torch.randn(2, 3, WIDTH)
    with pytest.raises(CaptureError, match="first call of SetsScale sets scale"):
        ax.convert(model, (x,), check=False)
    assert model.scale is None
    model(x)
    torch.testing.assert_close(ax.convert(model, (x,))(2 * x), model(2 * x))


class Logged(Net):
    def forward(self, x):
        RUNS.append("a call")
        return self.body(x)


RUNS = []


def test_a_log_of_plain_values_is_noted_and_its_model_converts():
    RUNS.clear()
    converted = ax.convert(Logged(), (torch.randn(2, 3, WIDTH),))
    assert any("RUNS" in note and "does not" in note for note in converted.report.notes)
    runs = len(RUNS)
    assert 0 < runs <= 6  # the self-check's; a capture runs nothing
    converted(torch.randn(2, 3, WIDTH))
    assert len(RUNS) == runs
