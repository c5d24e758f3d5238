"""What is traced and checked in a model's place: nothing of it leads back to the model itself."""

import functools

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.capture.module_clone import clone_tree

WIDTH = 6


class Pair(nn.Module):
    """Two layers that add what they compute."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x)).tanh()
        return self.last(x)


class Doubled:
    """Calls what it was given with twice the argument."""

    def __init__(self, call):
        self.call = call

    def __call__(self, x):
        return self.call(2 * x)

    def run(self, x):
        return self.call(2 * x)


def closure(model):
    forward = model.forward
    return lambda x: forward(2 * x)


def wrapped(model):
    forward = model.forward
    return functools.wraps(forward)(lambda x: forward(2 * x))


def default(model):
    return lambda x, call=model.forward: call(2 * x)


def partial(model):
    return functools.partial(lambda call, x: call(2 * x), model.forward)


def global_variable(model):
    held = {"call": model.forward}
    exec("def doubled(x):\n    return call(2 * x)", held)
    return held["doubled"]


FORWARDS = {
    "closure": closure,
    "wrapped": wrapped,
    "default": default,
    "partial": partial,
    "object": lambda model: Doubled(model.forward),
    "method of an object": lambda model: Doubled(model.forward).run,
    "global variable": global_variable,
}


@pytest.mark.parametrize("kind", FORWARDS)
def test_a_forward_set_on_a_module_runs_on_its_clone(kind):
    model = Pair()
    model.forward = FORWARDS[kind](model)
    clone, _ = clone_tree(model)
    clone.last = nn.Identity()
    x = torch.randn(2, WIDTH)
    y = 2 * x
    for norm, mix in zip(model.norms, model.mixes, strict=True):
        y = y + mix(norm(y)).tanh()
    assert torch.equal(clone(x), y)
    assert torch.equal(model(x), model.last(y))


def test_what_a_forward_counts_outside_of_the_model_is_shared_with_its_clone():
    model, seen = Pair(), []
    forward = model.forward

    def counted(x):
        seen.append(1)
        return forward(x)

    model.forward = counted
    clone_tree(model)[0](torch.randn(2, WIDTH))
    assert seen == [1]


def test_a_model_with_a_forward_around_its_own_converts_and_copies():
    model = Pair()
    model.forward = wrapped(model)
    x = torch.randn(2, 3, WIDTH)
    converted = ax.convert(model, (x,))
    assert all(p.grad is None for p in model.parameters())
    for found in (converted, converted.eval()):
        torch.testing.assert_close(found(x), model(x))


@pytest.mark.parametrize("check", [True, False])
def test_a_model_that_was_compiled_converts_to_attention_over_depth(check):
    model = Pair()
    model.compile(backend="eager")
    x = torch.randn(2, 3, WIDTH)
    converted = ax.convert(model, (x,), check=check)
    torch.testing.assert_close(converted(x), model(x))
    for read in converted.attnres.reads:
        nn.init.normal_(read.query)
    assert not torch.allclose(converted(x), model(x), atol=1e-3)


def test_what_torch_compile_returned_is_converted_as_what_is_inside():
    model = Pair()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, WIDTH)
    assert ax.inspect(compiled, (x,)).streams
    converted = ax.convert(compiled, (x,))
    assert isinstance(converted, Pair)
    assert ax.verify(compiled, converted, (x,)).passed


def test_a_compiled_conversion_changes_its_mode():
    converted = ax.convert(Pair(), (torch.randn(2, 3, WIDTH),))
    converted.compile(backend="eager")
    assert not converted.eval().training


def test_hooks_of_the_state_get_the_converted_model():
    seen = []
    model = Pair()
    model.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model.register_load_state_dict_post_hook(lambda module, _: seen.append(module))
    model.register_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model.register_state_dict_post_hook(lambda module, *_: seen.append(module))
    converted = ax.convert(model, (torch.randn(2, 3, WIDTH),), check=False)
    seen.clear()
    converted.load_state_dict(converted.state_dict())
    assert len(seen) == 4 and all(module is converted for module in seen)
