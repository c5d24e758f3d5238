"""A converted model runs what the `training` flags of its submodules say, in whatever mix."""

import copy
import functools

import pytest
import torch
from torch import nn

import attnres_fx as ax

WIDTH = 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.batch, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.batch(x.transpose(1, 2)).transpose(1, 2))
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        return x


class Frozen(Net):
    """Keeps its batch norm in eval mode, as fine-tuning code does."""

    def train(self, mode=True):
        super().train(mode)
        self.batch.eval()
        return self


def example():
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def assert_same_run(converted, original):
    results = []
    for model in (converted, original):
        torch.manual_seed(3)
        results.append(model(example()))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(converted.batch.running_mean, original.batch.running_mean)


@functools.cache
def trained():
    torch.manual_seed(0)
    return ax.convert(Net(), (example(),), check=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.batch.eval(),
        lambda m: m.drop.eval(),
        lambda m: (m.eval(), m.drop.train()),
        lambda m: (m.batch.eval(), m(example()), m.batch.train()),
    ],
    ids=["batch norm frozen", "no dropout", "dropout at inference", "frozen and back"],
)
def test_a_submodule_in_a_mode_of_its_own_runs_in_that_mode(change):
    converted = copy.deepcopy(trained())
    original = copy.deepcopy(trained().original())
    change(converted)
    change(original)
    assert_same_run(converted, original)


def test_flags_that_differed_at_the_conversion_may_be_put_right():
    torch.manual_seed(0)
    model = Net()
    model.batch.eval()
    original = copy.deepcopy(model)
    converted = ax.convert(model, (example(),), check=False)
    assert_same_run(converted, original)
    assert_same_run(converted.train(), original.train())


@pytest.mark.slow
def test_a_class_that_sets_flags_in_train_is_right_from_its_first_switch():
    model = Frozen()
    original = copy.deepcopy(model)
    converted = ax.convert(model, (example(),), check=False)
    assert_same_run(converted, original)
    for mode in (True, False, True):
        assert_same_run(converted.train(mode), original.train(mode))


def test_verify_compares_what_a_call_runs():
    converted = copy.deepcopy(trained())
    original = copy.deepcopy(converted.original())
    for model in (converted, original):
        model.drop.eval()
    assert ax.verify(original, converted, (example(),)).passed


@pytest.mark.slow
def test_a_compiled_call_has_the_flags_of_the_model():
    converted = copy.deepcopy(trained())
    original = copy.deepcopy(converted.original())
    compiled = torch.compile(converted, backend="eager")
    assert_same_run(compiled, original)
    for model in (converted, original):
        model.drop.eval()
    assert_same_run(compiled, original)
