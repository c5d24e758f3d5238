"""Numbers that come from beside torch: held ones are kept, drawn and measured ones are refused by name."""

import copy
import random
import secrets
import time

import numpy as np
import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import CaptureError

WIDTH = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def body(self, x):
        for mix in self.mixes:
            x = x + mix(x).tanh()
        return x


class HoldsNumpy(Net):
    def __init__(self):
        super().__init__()
        self.scale = np.float32(0.5)
        self.steps = list(np.linspace(0.5, 1, 2))
        self.table = np.linspace(0, 1, WIDTH).astype("float32")

    def forward(self, x):
        for step, mix in zip(self.steps, self.mixes, strict=True):
            x = x + step * mix(x)
        return x * self.scale * torch.from_numpy(self.table)


def test_what_a_module_holds_of_numpy_is_kept_and_followed():
    model, x = HoldsNumpy(), torch.randn(2, 3, WIDTH)
    converted = ax.convert(model, (x,))
    torch.testing.assert_close(converted(x), model(x))
    model.scale, model.table = np.float32(3.0), model.table + 1
    torch.testing.assert_close(converted(x), model(x))


def drawn(function):
    class Drawing(Net):
        def forward(self, x):
            return self.body(x * function())

    return Drawing()


def seeded():
    torch.manual_seed(3)
    return torch.rand(())


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (
            lambda: random.random(),
            r"would lose draws of Python's random: draw with torch .*ax\.compile goes through Dynamo too",
        ),
        (lambda: float(np.random.rand()), "numpy's random"),
        (lambda: torch.from_numpy(np.random.rand(WIDTH).astype("float32")), "numpy's random"),
        (random.random, "another number that Python makes anew"),
        (lambda: time.time() % 1000, "the time of the call"),
        (lambda: secrets.randbelow(100), "secrets"),
        (seeded, "seeding of torch's generator"),
    ],
)
def test_what_is_drawn_or_measured_beside_torch_is_refused_by_name(function, named):
    with pytest.raises(CaptureError, match=named):
        ax.convert(drawn(function).eval(), (torch.randn(2, 3, WIDTH),), check=False)


def test_a_time_that_is_told_and_not_computed_with_is_no_obstacle():
    class Timed(Net):
        def forward(self, x):
            begun = time.time()
            x = self.body(x)
            str(time.time() - begun)
            return x

    model, x = Timed().eval(), torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(ax.convert(model, (x,))(x), model(x))


@pytest.mark.parametrize("number", [lambda h: h.mean().item(), lambda h: (h > 0).sum().item()])
def test_a_number_read_from_a_tensor_is_refused_among_the_outputs(number):
    class Reads(Net):
        def forward(self, x):
            h = self.body(x)
            return h, number(h)

    with pytest.raises(CaptureError, match=r"\.item\(\)"):
        ax.convert(Reads(), (torch.randn(2, 3, WIDTH),))


def test_a_number_read_from_a_tensor_and_kept_is_told_as_kept():
    class Keeps(Net):
        def forward(self, x):
            if not hasattr(self, "scale"):
                self.scale = float(x.abs().mean())
            return self.body(x) * self.scale

    with pytest.raises(CaptureError, match=r"what a call leaves in an attribute, .*keep the tensor itself"):
        ax.convert(Keeps(), (torch.randn(2, 3, WIDTH),), dynamic_shapes={})


def test_sparse_gradients_are_compared():
    class Sparse(Net):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, WIDTH, sparse=True)

        def forward(self, ids):
            return self.body(self.embed(ids))

    model, ids = Sparse(), torch.arange(4)[None]
    original, converted = copy.deepcopy(model), ax.convert(model, (ids,))
    for m in (original, converted):
        m(ids).square().sum().backward()
    assert converted.embed.weight.grad.is_sparse
    torch.testing.assert_close(converted.embed.weight.grad.to_dense(), original.embed.weight.grad.to_dense())


def test_writes_through_data_are_kept_and_leave_the_callers_weights():
    class Clamped(Net):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(5.0))

        def forward(self, x):
            self.log_scale.data.clamp_(max=1.0)
            return self.body(x * self.log_scale.exp())

    model, x = Clamped(), torch.randn(2, 3, WIDTH)
    original, converted = copy.deepcopy(model), ax.convert(model, (x,))
    assert model.log_scale == 5.0
    torch.testing.assert_close(converted(x), original(x))
    assert converted.log_scale == 1.0
