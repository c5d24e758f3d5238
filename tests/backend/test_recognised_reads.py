"""A read is the same read whatever Dynamo writes before the path of its module, and whatever calls the model."""

import functools
import types

import pytest
import torch
from torch import nn

import attnres_fx as ax
from tests.support.attached import VARIANTS, with_random_queries

EAGER = {"inner": "eager"}


class Net(nn.Module):
    def __init__(self, width=16, layers=3):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.mixes = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=False):
            x = x + mix(norm(x)).tanh()
        return self.norms[-1](x)


class LooksIntoSettings(Net):
    """As diffusers' models: a `__getattr__` of its own."""

    def __getattr__(self, name):
        if "settings" in self.__dict__ and name in self.__dict__["settings"]:
            return self.__dict__["settings"][name]
        return super().__getattr__(name)

    def __init__(self):
        super().__init__()
        self.settings = {"sample_size": 8}


class HeldInLists(Net):
    """Its modules are registered one by one and called from a Python list and a dict."""

    def __init__(self):
        super().__init__()
        self.order = [self.norms[i] for i in range(4)]
        self.named = {f"mix {i}": self.mixes[i] for i in range(3)}

    def forward(self, x):
        for i in range(3):
            x = x + self.named[f"mix {i}"](self.order[i](x)).tanh()
        return self.order[3](x)


class WithoutFinalNorm(Net):
    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=False):
            x = x + mix(norm(x)).tanh()
        return x


CLASSES = [Net, LooksIntoSettings, HeldInLists, WithoutFinalNorm]


def casting(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            return function(*args, **kwargs)

    return wrapped


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.stages = nn.ModuleDict({"first": nn.Identity(), "model": model})

    def forward(self, x):
        return self.stages["model"](self.stages["first"](x)).clone()


class CallsForward(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner.forward(x)


def wrapped_as_accelerate_does(model):
    model.forward = types.MethodType(casting(model.forward.__func__), model)
    return model


def wrapped_bound(model):
    model.forward = casting(model.forward)
    return model


CALLERS = {
    "itself": lambda model: model,
    "a forward that takes the model": wrapped_as_accelerate_does,
    "a wrapped bound forward": wrapped_bound,
    "a function": lambda model: lambda x: model(x) * 1,
    "its forward": lambda model: model.forward,
    "nn.Sequential": lambda model: nn.Sequential(nn.Identity(), model),
    "a module that holds it": Holder,
    "a module that calls its forward": CallsForward,
    "a dictionary": lambda model: lambda x, held={"model": model}: held["model"](x),
}


def built(kind):
    torch.manual_seed(0)
    return kind().eval(), torch.randn(2, 5, 16)


@functools.cache
def converted(kind):
    """The names of its reads, and what the converted model computes with the queries that `attached` draws."""
    model, x = built(kind)
    rewritten = with_random_queries(ax.convert(model, (x,), config=VARIANTS["full"], check=False))
    return rewritten.attnres.reads.names, rewritten(x).detach()


def attached(kind):
    model, x = built(kind)
    names, expected = converted(kind)
    ax.attach(model, (x,), config=VARIANTS["full"])
    assert model.attnres.reads.names == names
    return with_random_queries(model), x, expected


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("caller", CALLERS)
def test_a_model_computes_the_same_whatever_calls_it(kind, caller):
    model, x, expected = attached(kind)
    call = torch.compile(CALLERS[caller](model), backend="attnres", fullgraph=True, options=EAGER)
    torch.testing.assert_close(call(x), expected)


def test_a_model_that_is_compiled_in_place_may_be_hooked_and_called_by_others():
    model, x, expected = attached(Net)
    model.register_forward_hook(lambda module, args, output: output.clone())
    model.compile(backend="attnres", fullgraph=True, options=EAGER)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(Holder(model)(x), expected)
    outer = torch.compile(Holder(model), backend="attnres", fullgraph=True, options=EAGER)
    torch.testing.assert_close(outer(x), expected)


def test_a_head_and_a_norm_outside_are_no_part_of_the_model():
    class Outer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.last, self.head = model, nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.last(self.model(x)))

    model, x, expected = attached(WithoutFinalNorm)
    outer = Outer(model).eval()
    found = torch.compile(outer, backend="attnres", fullgraph=True, options=EAGER)(x)
    torch.testing.assert_close(found, outer.head(outer.last(expected)))


def test_a_stream_outside_the_model_is_left_as_it_is():
    class Outer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.own = model, Net()

        def forward(self, x):
            return self.own(self.model(x))

    model, x, expected = attached(Net)
    outer = Outer(model).eval()
    found = torch.compile(outer, backend="attnres", fullgraph=True, options=EAGER)(x)
    torch.testing.assert_close(found, outer.own(expected))


class Adapted(nn.Module):
    """A layer inside another, as adapters put it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.down = base_layer, nn.Linear(16, 2, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 0 * self.down(x).sum(-1, keepdim=True)


class WithoutNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        for mix in self.mixes:
            x = x + mix(x).tanh()
        return x


def test_an_adapter_put_around_the_module_that_reads_leaves_the_read_what_it_was():
    model, x, expected = attached(WithoutNorms)
    for i in range(3):
        model.mixes[i] = Adapted(model.mixes[i])
    found = torch.compile(model, backend="attnres", fullgraph=True, options=EAGER)(x)
    torch.testing.assert_close(found, expected)


class TakesOtherNorms(Net):
    def __init__(self):
        super().__init__()
        self.others, self.swapped = nn.ModuleList(nn.LayerNorm(16) for _ in range(4)), False

    def forward(self, x):
        norms = self.others if self.swapped else self.norms
        for norm, mix in zip(norms, self.mixes, strict=False):
            x = x + mix(norm(x)).tanh()
        return norms[-1](x)


def test_reads_of_other_modules_are_refused():
    model, x, _ = attached(TakesOtherNorms)
    model.swapped = True
    with pytest.raises(ax.errors.BackendError, match=r"0 of the 3 reads.*others\.1"):
        torch.compile(model, backend="attnres", fullgraph=True, options=EAGER)(x)


def test_a_forward_replaced_before_attach_is_named_with_the_order_that_works():
    model = wrapped_as_accelerate_does(Net())
    with pytest.raises(ax.errors.AttachError, match=r"replaced on the instance by .*wrapped .*Attach the model first"):
        ax.attach(model, (torch.randn(2, 5, 16),))
