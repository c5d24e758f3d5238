"""What a graph takes for granted of a call: another call gets a graph of its own, or is refused."""

import copy
import io
from typing import ClassVar

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import ArgumentError

WIDTH = 4
SCALE = 1.0


class Net(nn.Module):
    factor: ClassVar[float] = 1.0

    def __init__(self):
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def body(self, x):
        for mix in self.mixes:
            x = x + mix(x).tanh()
        return x

    def forward(self, x):
        return self.body(x)


class ScaledByArgument(Net):
    def forward(self, given):
        scale = given["scale"] if isinstance(given, dict) else given[1]
        return self.body(given["x"] if isinstance(given, dict) else given[0]) * (3.0 if scale is True else scale)


class AsksForGradients(Net):
    def forward(self, x):
        return self.body(x) * (2.0 if torch.is_grad_enabled() else 3.0) * (5.0 if x.requires_grad else 1.0)


class AsksForStrides(Net):
    def forward(self, x):
        return self.body(x) * (2.0 if x.is_contiguous() else 3.0)


class Two(Net):
    def forward(self, x, y):
        return self.body(x + 2 * y) * (2.0 if x is y else 3.0)


class ScaledByGlobal(Net):
    def forward(self, x):
        return self.body(x) * SCALE * type(self).factor


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -3 * grad


class OnFrozen(Net):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, WIDTH).requires_grad_(False)

    def forward(self, ids):
        return self.body(Negated.apply(self.embed(ids)))


def example(seed=0):
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("given", [{"x": example(), "scale": 1.0}, (example(), False)])
def test_a_constant_beside_a_tensor_counts_at_every_call(given):
    model = ScaledByArgument()
    converted = ax.convert(model, (given,), check="outputs")
    for scale in (2.0, True):
        call = {"x": example(1), "scale": scale} if isinstance(given, dict) else type(given)([example(1), scale])
        torch.testing.assert_close(converted(call), model(call))


def test_a_loaded_file_refuses_another_constant_by_the_name_of_the_argument():
    converted, file = ax.convert(ScaledByArgument(), ({"x": example(), "scale": 1.0},), check=False), io.BytesIO()
    converted.save(file)
    file.seek(0)
    loaded = ax.load(file)
    torch.testing.assert_close(loaded({"x": example(), "scale": 1.0}), converted({"x": example(), "scale": 1.0}))
    with pytest.raises(ArgumentError, match=r"given_scale' is 2\.0; the model was captured with 1\.0"):
        loaded({"x": example(), "scale": 2.0})


@pytest.mark.parametrize("check", [True, "outputs"])
def test_a_branch_on_gradients_follows_the_call(check):
    model = AsksForGradients()
    converted = ax.convert(model, (example(),), check=check)
    for x in (example(1), example(1).requires_grad_()):
        torch.testing.assert_close(converted(x), model(x))
        with torch.no_grad():
            torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("turned", [False, True])
def test_a_branch_on_strides_follows_the_call(turned):
    model, plain = AsksForStrides(), example()
    transposed = example().transpose(0, 1).contiguous().transpose(0, 1)
    converted = ax.convert(model, (transposed if turned else plain,))
    for x in (plain, transposed):
        torch.testing.assert_close(converted(x), model(x))


def test_cuts_of_longer_tensors_are_one_kind_of_call():
    model = AsksForStrides()
    converted = ax.convert(model, (torch.randn(2, 4, WIDTH)[:, :3],))
    for length in range(5, 16):
        cut = torch.randn(2, length, WIDTH)[:, :3]
        torch.testing.assert_close(converted(cut), model(cut))


@pytest.mark.parametrize("once", [False, True])
def test_one_tensor_given_twice_and_two_tensors_are_two_kinds_of_calls(once):
    model, x, y = Two(), example(), example(1)
    converted = ax.convert(model, (x, x) if once else (x, y))
    for call in ((x, x), (x, y), (y, y)):
        torch.testing.assert_close(converted(*call), model(*call))


def test_a_custom_backward_on_what_was_frozen_is_kept_when_it_is_trained_later():
    model, ids = OnFrozen(), torch.arange(5)[None]
    original, converted = copy.deepcopy(model), ax.convert(model, (ids,))
    for m in (original, converted):
        m.embed.requires_grad_(True)
        m(ids).square().sum().backward()
    torch.testing.assert_close(converted.embed.weight.grad, original.embed.weight.grad)


def test_a_global_and_a_number_of_the_class_are_followed(monkeypatch):
    model = ScaledByGlobal()
    converted = ax.convert(model, (example(),))
    for scale, factor in ((3.0, 1.0), (1.0, 1.0), (1.0, 5.0)):
        monkeypatch.setattr("tests.capture.test_assumed.SCALE", scale)
        monkeypatch.setattr(ScaledByGlobal, "factor", factor)
        torch.testing.assert_close(converted(example(1)), model(example(1)))
