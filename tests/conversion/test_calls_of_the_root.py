"""What a call of a model runs around its forward: hooks on the model itself, and a `__call__` of its class."""

import copy
import pickle

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import CaptureError, ModeError
from tests.capture.test_clones import WIDTH, Pair


class OwnCall(Pair):
    """Its call takes other arguments than its forward, and doubles what that returns."""

    def __call__(self, batch, scale=2.0):
        return super().__call__(batch["x"] + 1) * scale


class CallAlone(Pair):
    """Has no use for a forward."""

    def __call__(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x)).tanh()
        return self.last(x)

    def forward(self, x):
        raise NotImplementedError


def add_one(_, args):
    return (args[0] + torch.arange(WIDTH),)


def double(_, args, output):
    return output * 2


def hooked():
    model = Pair()
    model.register_forward_pre_hook(add_one)
    model.register_forward_hook(double)
    return model


def example(*sizes):
    return torch.randn(*sizes, WIDTH)


def test_hooks_on_the_model_itself_are_run_once():
    model = hooked()
    converted = ax.convert(model, (example(2, 3),))
    for x in (example(2, 3), example(1, 4)):
        torch.testing.assert_close(converted(x), model(x))
        torch.testing.assert_close(copy.deepcopy(converted)(x), model(x))
    torch.testing.assert_close(converted.eval()(x), model(x))


def test_hooks_registered_after_a_conversion_run_once_in_programs_that_are_captured_later():
    model = hooked()
    converted = ax.convert(model, (example(2, 3),), check=False)
    converted.register_forward_hook(double)
    x = example(1, 3)
    torch.testing.assert_close(converted.eval()(x), 2 * model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(converted))(x), 2 * model(x))


def test_a_file_holds_the_hooks_that_were_there_at_the_conversion(tmp_path):
    model = hooked()
    ax.convert(model, (example(2, 3),), check=False).save(tmp_path / "file")
    x = example(2, 3)
    torch.testing.assert_close(ax.load(tmp_path / "file")(x), model(x))


def test_hooks_on_a_symbolic_trace_stay_on_its_conversion():
    model = torch.fx.symbolic_trace(Pair())
    model.register_forward_hook(double)
    x = example(2, 3)
    torch.testing.assert_close(ax.convert(model, (x,))(x), model(x))


@pytest.mark.slow
def test_hooks_that_write_to_python_go_on_firing():
    model, seen = Pair(), []

    def triple(_, args, output):
        seen.append(tuple(output.shape))
        return output * 3

    model.register_forward_hook(triple)
    x = example(2, 3)
    converted = ax.convert(model, (x,))
    seen.clear()
    torch.testing.assert_close(converted(x), model(x))
    assert seen == [(2, 3, WIDTH)] * 2
    torch.testing.assert_close(converted.eval()(x), model(x))


def test_backward_hooks_on_the_model_itself_fire():
    model = Pair()
    model.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 3,))
    converted = ax.convert(model, (example(2, 3),))
    assert converted.training
    x, y = (torch.ones(2, 3, WIDTH).cumsum(1).requires_grad_() for _ in range(2))
    model(x).square().sum().backward()
    converted(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_call_of_the_class_is_run_once_with_its_own_arguments():
    model = OwnCall()
    converted = ax.convert(model, ({"x": example(2, 3)},))
    for batch in ({"x": example(2, 3)}, {"x": example(1, 2)}):
        torch.testing.assert_close(converted(batch), model(batch))
    torch.testing.assert_close(converted(batch, scale=5.0), model(batch, scale=5.0))


def test_a_class_with_a_call_and_no_forward_converts():
    model = CallAlone()
    x = example(2, 3)
    converted = ax.convert(model, (x,))
    nn.init.normal_(next(iter(converted.attnres.reads)).query)
    assert not torch.allclose(converted(x), model(x), atol=1e-3)


def test_a_call_of_the_class_with_a_hook_that_writes_to_python_is_refused_by_name():
    model, seen = OwnCall(), []

    def note(_, args, output):
        seen.append(1)

    model.register_forward_hook(note)
    with pytest.raises(CaptureError, match=r"changes Python state.*seen\.append"):
        ax.convert(model, ({"x": example(2, 3)},))


def test_a_backward_through_a_graph_without_gradients_says_why():
    model = Pair()
    model.mixes[0].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    converted = ax.convert(model, (example(2, 3),))
    assert not converted.training
    with pytest.raises(ModeError, match=r"the backward hook of mixes\.0.*no train graph.*convert it again"):
        converted(example(2, 3)).sum().backward()
    with torch.no_grad():
        assert not converted(example(2, 3)).requires_grad
    converted.requires_grad_(False)
    assert not converted(example(2, 3)).requires_grad
