"""Names that a model and its conversion both have: the model keeps its own, or is refused by name."""

import copy

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import CaptureError, RewriteError
from tests.capture.test_clones import WIDTH, Pair

KEPT = ("save", "mode", "programs", "failures", "signature", "in_spec", "lowering", "typed")


class Scaled(Pair):
    """Scales its input by something it holds under any name."""

    def __init__(self, name, held):
        super().__init__()
        setattr(self, name, held)
        self.name = name

    def forward(self, x):
        held = getattr(self, self.name)
        return super().forward(held(x) if isinstance(held, nn.Module) else x * held)


def holding(kind):
    return {"number": 2.0, "parameter": nn.Parameter(torch.tensor(2.0)), "submodule": nn.Linear(WIDTH, WIDTH)}[kind]


def example():
    return torch.randn(2, 3, WIDTH)


@pytest.mark.parametrize("kind", ["number", "parameter", "submodule"])
def test_a_model_keeps_what_it_holds_under_names_of_a_converted_model(kind):
    for name in ("mode", "signature"):
        model = Scaled(name, holding(kind))
        converted = ax.convert(model, (example(),), check=False)
        x = example()
        torch.testing.assert_close(converted(x), model(x))
        assert getattr(converted, name) is getattr(model, name) or kind == "submodule"
        added = set(converted.state_dict()) - set(model.state_dict())
        assert added == set(converted.attnres.state_dict(prefix="attnres."))
        assert any(name in note for note in converted.report.notes)


def test_numbers_under_all_such_names_are_kept_together():
    model = Scaled(KEPT[0], 2.0)
    for name in KEPT[1:]:
        setattr(model, name, name)
    converted = ax.convert(model, (example(),))
    x = example()
    torch.testing.assert_close(converted.eval()(x), model(x))
    assert [getattr(converted, name) for name in KEPT] == [2.0, *KEPT[1:]]
    assert ax.verify(model.eval(), converted, (x,)).passed


def test_such_a_model_is_checked_copied_saved_and_switched(tmp_path):
    model = Scaled("mode", holding("parameter"))
    model.signature = "mine"
    converted = ax.convert(model, (example(),))
    copied = copy.deepcopy(converted).eval()
    assert copied.signature == "mine" and not copied.training
    converted.signature = "another"
    assert converted.signature == "another" and model.signature == "mine"
    ax.ConvertedModel.save(converted, tmp_path / "file")
    x = example()
    torch.testing.assert_close(ax.load(tmp_path / "file")(x), model(x))
    with torch.no_grad():
        converted.mode.fill_(3.0)
    torch.testing.assert_close(converted(x), model(x))


class Methods(Pair):
    """Has methods under the names of a converted model's."""

    def save(self, path):
        return f"saved to {path}"

    @property
    def mode(self):
        return "mine"


def test_a_method_of_the_class_is_kept():
    converted = ax.convert(Methods(), (example(),), check=False)
    assert converted.save("a") == "saved to a"
    assert converted.mode == "mine"


@pytest.mark.parametrize("name", ["report", "attnres", "graph_module", "original", "replacements"])
@pytest.mark.parametrize("kind", ["number", "parameter", "submodule"])
def test_names_that_a_conversion_needs_are_refused_before_anything_is_done(name, kind):
    model = Scaled(name, holding(kind))
    with pytest.raises(RewriteError, match=rf"Scaled has an? \w+ named '{name}'"):
        ax.convert(model, (example(),))


@pytest.mark.parametrize("name", ["code", "graph", "recompile", "meta"])
@pytest.mark.parametrize("kind", ["parameter", "submodule"])
def test_tensors_and_modules_under_names_of_a_graph_module_are_refused_by_name(name, kind):
    model = Scaled(name, holding(kind))
    with pytest.raises(CaptureError, match=rf"Scaled has a {kind} named '{name}'.*rename it"):
        ax.convert(model, (example(),))
    inside = nn.Sequential(model)
    x = example()
    torch.testing.assert_close(ax.convert(inside, (x,), check=False)(x), model(x))


def test_a_number_under_the_name_of_a_graph_is_kept():
    model = Scaled("graph", 2.0)
    x = example()
    torch.testing.assert_close(ax.convert(model, (x,), check=False)(x), model(x))
