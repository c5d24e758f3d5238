"""The backend never computes plain residuals in silence, and refuses what it cannot compile by name."""

import inspect

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import AttachError, BackendError, EagerCallError, NoStreamError
from tests.support.attached import (
    VARIANTS,
    Broken,
    attached_net,
)


def test_an_eager_call_of_an_attached_model_raises_and_plain_runs_the_original():
    model, x = Broken(), torch.randn(2, 4, 8)
    expected = model(x)
    ax.attach(model, (x,))
    with pytest.raises(EagerCallError, match=r"model\.compile\(backend='attnres'"):
        model(x)
    with ax.plain(model):
        torch.testing.assert_close(model(x), expected)
    with pytest.raises(EagerCallError):
        model(x)


def test_running_out_of_recompilations_raises():
    model, _ = attached_net(fullgraph=False, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(EagerCallError, match="recompiles"):
        for length in range(3, 9):
            model(torch.randn(2, length, 8))


def test_a_graph_break_inside_the_stream_is_an_error_that_shows_the_line():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    model.breaks = True
    model.compile(backend="attnres", options={"inner": "eager"})
    with pytest.raises(BackendError, match=rf"graph break at {inspect.getfile(Broken)}:\d+"):
        model(x)


def test_a_model_changed_after_attach_names_the_reads_that_no_longer_match():
    model, x = attached_net()
    model.layers = model.layers[:2]
    with pytest.raises(BackendError, match=r"1 of the 3 reads.*norms\.2"):
        model(x)


BAD = {
    "an unknown option": ({"outer": 1}, r"'outer' are unknown.*inner, mode, inductor"),
    "an inner backend that does not exist": ({"inner": "nothing"}, "'nothing', which is no backend here"),
    "a mode that does not exist": ({"mode": "nonsense"}, "none of Inductor's"),
    "an Inductor option that does not exist": ({"inductor": {"no_such": 1}}, "Inductor does not know"),
    "Inductor's options for another compiler": ({"inner": "eager", "mode": "max-autotune"}, "for inner='inductor'"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.slow_after(1)
def test_options_that_mean_nothing(name):
    options, words = BAD[name]
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    model.compile(backend="attnres", fullgraph=True, options=options)
    with pytest.raises(BackendError, match=words):
        model(x)


def test_compile_refuses_bad_options_before_it_touches_the_model():
    model = Broken()
    with pytest.raises(BackendError, match="no backend here"):
        ax.compile(model, (torch.randn(2, 4, 8),), inner="nothing")
    assert not hasattr(model, "attnres")


def test_attaching_and_compiling_twice_are_errors():
    model, x = attached_net()
    with pytest.raises(AttachError, match="attached already"):
        ax.attach(model, (x,))
    with pytest.raises(BackendError, match="compiled already"):
        ax.compile(model, (x,))


def test_a_model_without_a_stream_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(NoStreamError):
        ax.compile(model, (torch.randn(2, 4),))
    assert not hasattr(model, "attnres") and "forward" not in vars(model)


def test_queries_on_another_device_or_of_another_dtype_are_refused():
    model, x = attached_net()
    model.attnres.to(torch.bfloat16)
    with pytest.raises(BackendError, match=r"float32 and its query torch\.bfloat16"):
        model(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_an_attached_model_behind_another_backend_raises(backend):
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    with pytest.raises(Exception, match="would compute plain residuals"):
        torch.compile(model, backend=backend)(x)


def test_an_attached_model_cannot_be_exported_as_what_it_is_not():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    with pytest.raises(ax.AttnResError):
        torch.export.export(model, (x,)).run_decompositions().module()(x)


def test_parts_attached_by_themselves_are_refused_inside_a_larger_model():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Broken(), Broken()

        def forward(self, x):
            return self.b(self.a(x))

    model, x = Two(), torch.randn(2, 4, 8)
    ax.attach(model.a, (x,))
    ax.attach(model.b, (x,))
    with pytest.raises(BackendError, match="two attached models are in one compiled graph"):
        torch.compile(model, backend="attnres", options={"inner": "eager"})(x)


def test_compiling_an_attached_model_with_another_config_is_an_error():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,), config=VARIANTS["full"])
    with pytest.raises(AttachError, match="another config"):
        ax.compile(model, (x,), config=VARIANTS["block"])


def test_an_attached_model_is_converted_after_detach():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    for call in (ax.convert, ax.inspect):
        with pytest.raises(ax.errors.AlreadyConvertedError, match="detach"):
            call(model, (x,))


def test_a_config_that_cannot_be_read_is_named():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    state = model.state_dict()
    state["attnres._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ax.errors.ConfigError, match="_extra_state"):
        model.load_state_dict(state)


class DoubleSums(nn.Module):
    """Adds in float64 what it computes in float32."""

    def __init__(self):
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for mix in self.mixes:
            x = (x.double() + mix(x).double()).float()
        return x


def test_a_stream_more_precise_than_its_queries_says_how_to_cast_them():
    model, x = DoubleSums(), torch.randn(2, 3, 8)
    expected = model(x)
    ax.compile(model, (x,), inner="eager")
    with pytest.raises(BackendError, match=r"Cast them: model\.attnres\.to\(torch\.float64\)"):
        model(x)
    torch.compiler.reset()
    model.attnres.to(torch.float64)
    torch.testing.assert_close(model(x), expected)
