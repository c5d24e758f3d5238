"""Every misuse is an error of its own kind, and leaves the caller's model as it was."""

import copy

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx import errors


class Residual(nn.Module):
    def __init__(self, width=8, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + layer(norm(x))
        return self.norms[-1](x)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x).relu()


class Untraceable(Residual):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


class Gated(Residual):
    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=False):
            gate = torch.sigmoid(layer(x))
            x = x * (1 - gate) + layer(norm(x)) * gate
        return x


class HyperConnected(Residual):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(4))

    def forward(self, x):
        x = x.unsqueeze(2).expand(-1, -1, 4, -1)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = torch.einsum("mn,btnd->btmd", self.mix, x) + layer(norm(x.sum(2))).unsqueeze(2).expand(-1, -1, 4, -1)
        return x.sum(2)


class Widening(Residual):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(8, 16)

    def forward(self, x):
        x = x + self.layers[0](self.norms[0](x))
        return nn.functional.pad(x, (0, 8)) + self.wide(self.norms[1](x))


def example():
    return (torch.randn(2, 5, 8),)


def refuse(model, kind, match, *, args=None, **options):
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    with pytest.raises(kind, match=match) as caught:
        ax.convert(model, args or example(), config=ax.AttnResConfig(**options))
    assert isinstance(caught.value, ax.AttnResError)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert flags == [m.training for m in model.modules()]


def test_a_model_without_residual_stream():
    refuse(Plain(), errors.NoStreamError, "no residual stream")


def test_a_model_that_cannot_be_captured_names_cause_and_what_to_try():
    refuse(Untraceable(), errors.CaptureError, "could not be captured.*Try torch.compile")


def test_more_blocks_than_sublayers():
    refuse(Residual(), errors.ScheduleError, "num_blocks=4 is more than the 3 sublayers", num_blocks=4)


def test_boundaries_past_the_end():
    refuse(Residual(), errors.ScheduleError, "boundaries", boundaries=[3])


def test_a_stream_name_that_does_not_exist():
    refuse(Residual(), errors.StreamNameError, "there is no stream 'decoder'", streams=["decoder"])


def test_a_gated_carry_is_refused_by_name():
    refuse(Gated(), errors.NotAdditiveError, "gated carry")


def test_hyper_connections_are_refused_by_name():
    refuse(HyperConnected(), errors.NotAdditiveError, "hyper-connections")


def test_a_stream_whose_width_changes():
    refuse(Widening(), errors.StreamWidthError, "from 8 to 16")


def test_a_model_that_was_converted_already():
    converted = ax.convert(Residual(), example())
    with pytest.raises(errors.AlreadyConvertedError, match="already"):
        ax.convert(converted, example())
    exported = torch.export.export(converted, example(), strict=False)
    with pytest.raises(errors.AlreadyConvertedError, match="already"):
        ax.convert(exported)


def test_an_unexpected_argument_is_named():
    converted = ax.convert(Residual(), example())
    with pytest.raises(errors.ArgumentError, match="'mask'"):
        converted(*example(), mask=None)
    with pytest.raises(errors.ArgumentError, match="missing argument 'x'"):
        converted()
    with pytest.raises(errors.ArgumentError, match="size 9 in dimension 2"):
        converted(torch.randn(2, 5, 9))


def test_a_mode_that_was_not_captured():
    class OnlyEval(Residual):
        def forward(self, x):
            if self.training and float(x.sum()) > 0:
                x = x * 2
            return super().forward(x)

    converted = ax.convert(OnlyEval().eval(), example())
    with pytest.raises(errors.ModeError, match="no train graph"):
        converted.train()
    assert not converted.training


def x():
    return torch.randn(2, 5, 8)


BAD_CALLS = {
    "a config that is a dict": (
        lambda: ax.convert(Residual(), (x(),), config={"variant": "full"}),
        errors.ConfigError,
        "dict",
    ),
    "a tensor for the tuple of arguments": (lambda: ax.convert(Residual(), x()), errors.ArgumentError, r"Write \(x,\)"),
    "a list for the dict of arguments": (
        lambda: ax.inspect(Residual(), (x(),), [x()]),
        errors.ArgumentError,
        "kwargs must be a dict",
    ),
    "a class for a model": (lambda: ax.convert(Residual, (x(),)), errors.CaptureError, r"pass an object of it, Res"),
    "more dynamic shapes than arguments": (
        lambda: ax.convert(Residual(), (x(),), dynamic_shapes=({}, {})),
        errors.ArgumentError,
        "2 entries where the call has 1 arguments",
    ),
    "a trace on other arguments": (
        lambda: ax.convert(torch.fx.symbolic_trace(Residual()), (torch.zeros(2, 3, 9),)),
        errors.CaptureError,
        r"size torch.Size\(\[2, 3, 9\]\)\)\. Give the arguments",
    ),
    "a width that the model itself cannot take": (
        lambda: ax.convert(Residual(), (x(),), check=False, dynamic_shapes={})(torch.zeros(2, 3, 9)),
        errors.ArgumentError,
        r"fixed there\..*Call the model itself with these arguments",
    ),
    "a TorchScript module": (
        lambda: ax.convert(torch.jit.trace(Residual(), x()), (x(),)),
        errors.CaptureError,
        "TorchScript",
    ),
    "a graph that was converted": (
        lambda: ax.convert(ax.convert(Residual(), (x(),)).graph_module(), (x(),)),
        errors.AlreadyConvertedError,
        "convert the original",
    ),
    "None for a tensor": (lambda: ax.convert(Residual(), (x(),))(None), errors.ArgumentError, "'x' is a NoneType"),
    "integers for floats": (
        lambda: ax.convert(Residual(), (x(),))(x().long()),
        errors.ArgumentError,
        "floating values",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_other_bad_calls(name):
    call, kind, words = BAD_CALLS[name]
    with pytest.raises(kind, match=words):
        call()


class Embedded(Residual):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 8)

    def forward(self, ids):
        return super().forward(self.table(ids))


def test_an_example_that_the_model_itself_cannot_take_is_told_apart_from_one_that_cannot_be_traced():
    for ids, cause in ((torch.ones(2, 3), "RuntimeError"), ("text", "TypeError")):
        with pytest.raises(errors.CaptureError, match=rf"{cause}: .*Call the model itself with these arguments"):
            ax.convert(Embedded(), (ids,), dynamic_shapes={})
    with pytest.raises(
        errors.ExampleError, match=r"Embedded itself fails on these arguments, in .* IndexError: "
    ) as told:
        ax.convert(Embedded(), (torch.full((2, 3), 7),), dynamic_shapes={})
    assert type(told.value.__cause__) is IndexError
