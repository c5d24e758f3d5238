"""What a file may hold: structures of results, functions by name, and what is refused."""

import collections
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import attnres_fx as ax
from attnres_fx.conversion.stored.operations import function_named, name_of
from attnres_fx.errors import ModeError, SaveError
from tests.support.paths import ROOT
from tests.support.saved_models import Tower, converted, loaded, saved

Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    extra: torch.Tensor | None = None


torch.export.register_dataclass(Result)


@pytest.mark.parametrize("make", [lambda x: Pair(x, x + 1), lambda x: Result(x), lambda x: {"a": [x], "b": (x, None)}])
def test_structures_of_outputs_come_back(make):
    class Structured(Tower):
        def forward(self, x):
            return make(super().forward(x))

    one, x = converted(Structured().eval(), torch.randn(2, 5, 8)), torch.randn(2, 5, 8)
    found, expected = loaded(one)(x), one(x)
    assert type(found) is type(expected)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)


@pytest.mark.slow
def test_a_class_that_is_not_imported_becomes_a_plain_structure_and_the_report_says_so(tmp_path):
    (tmp_path / "own_outputs.py").write_text(
        "import dataclasses, pathlib, torch\n"
        "pathlib.Path(__file__).with_name('imported').touch()\n"
        "@dataclasses.dataclass\nclass Own:\n    hidden: torch.Tensor\n"
        "torch.export.register_dataclass(Own)\n"
    )
    writing = """
import torch, attnres_fx as ax
from own_outputs import Own
from tests.support.saved_models import Tower
class Owning(Tower):
    def forward(self, x):
        return Own(super().forward(x))
ax.convert(Owning().eval(), (torch.randn(2, 5, 8),), check=False).save("model.file")
"""
    reading = """
import torch, attnres_fx as ax
model = ax.load("model.file")
result = model(torch.randn(2, 5, 8))
print(type(result).__name__, list(result), [n for n in model.report.notes if "own_outputs" in n])
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    for code in (writing, reading):
        (tmp_path / "imported").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dict ['hidden'] ['own_outputs:Own is not imported")
    assert not (tmp_path / "imported").exists(), "loading imported a module that the file names"


# --- what cannot go in is named ----------------------------------------------------------------------


def outside(x):
    return x * 2


torch.fx.wrap("outside")


def test_a_function_of_the_users_own_is_named():
    class Wrapped(Tower):
        def branch(self, i, h):
            return outside(self.mixes[i](h))

    class Traced(torch.fx.Tracer):
        def is_leaf_module(self, module, path):
            return isinstance(module, nn.Linear | nn.LayerNorm)

    with pytest.raises(SaveError, match="outside"):
        name_of(outside)
    model = Wrapped()
    one = converted(torch.fx.GraphModule(model, Traced().trace(model)), torch.randn(2, 5, 8))
    torch.testing.assert_close(loaded(one)(torch.ones(3, 4, 8)), one(torch.ones(3, 4, 8)))  # exported, it is inlined


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * 100


class Squares(nn.Module):
    def forward(self, x):
        return Square.apply(x)


def test_a_train_program_that_cannot_be_written_is_left_out_and_the_report_says_why(tmp_path):
    model = Tower()
    model.mixes[1] = Squares()

    class Traced(torch.fx.Tracer):
        def is_leaf_module(self, module, path):
            return True

    one = converted(torch.fx.GraphModule(model, Traced().trace(model)), torch.randn(2, 5, 8))
    assert set(one.programs) == {"train", "eval"}
    two = loaded(one.train())
    assert set(two.programs) == {"eval"}
    assert not two.training
    assert any("train program is not in the file" in n and "Square" in n for n in two.report.notes)
    with pytest.raises(ModeError, match="Square"):
        two.train()


@pytest.mark.slow
def test_an_eval_program_that_cannot_be_written_is_an_error_that_names_the_node():
    class Drawn(Tower):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator()

        def branch(self, i, h):
            return self.mixes[i](h) + torch.rand(8, generator=self.generator)

    try:
        one = converted(Drawn().eval(), torch.randn(2, 5, 8))
    except ax.AttnResError:
        return  # refused before
    with pytest.raises(SaveError, match="Generator"):
        saved(one)


def test_a_special_tensor_is_named():
    class Special(torch.Tensor):
        pass

    one = converted(Tower(), torch.randn(2, 5, 8))
    one.mixes[1].bias.data = one.mixes[1].bias.data.clone()
    one.register_buffer("odd", torch.zeros(3).as_subclass(Special))
    with pytest.raises(SaveError, match="odd is a Special"):
        saved(one)


def test_a_model_that_was_cast_since_is_not_saved_with_old_programs():
    one = converted(Tower().eval(), torch.randn(2, 5, 8)).double()
    with pytest.raises(SaveError, match="call the model once in eval mode"):
        saved(one)


def test_an_edited_model_is_not_saved_as_if_the_edit_had_an_effect():
    one = converted(Tower().eval(), torch.randn(2, 5, 8))
    one.mixes[0] = nn.Linear(8, 8)
    with pytest.raises(ax.errors.EditedError):
        saved(one)


# --- names that a file may hold ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [torch.add, F.relu_, F.linear, torch.Tensor.expand_as, torch.ops.aten.add.Tensor, torch.ops.aten.slice, checkpoint],
)
def test_functions_of_torch_have_names_that_lead_back(function):
    assert function_named(name_of(function)) is function


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "builtins.__import__",
        "operator.attrgetter",
        "operator.methodcaller",
        "torch.load",
        "torch.save",
        "torch.compile",
        "torch.hub.load",
        "torch.from_file",
        "torch.Tensor.apply_",
        "torch.Tensor.__reduce_ex__",
        "torch.utils.cpp_extension.load",
        "overload aten::from_file.default",
        "overload aten::save.default",
        "operator debugprims::load_tensor",
        "operator profiler::_record_function_enter",
        "operator no_such_library::operator",
        "operator aten::add(); import os",
        "higher order triton_kernel_wrapper_mutation",
        "",
        None,
        7,
        ["torch.add"],
    ],
)
def test_no_other_function_can_be_named(name):
    with pytest.raises(SaveError):
        function_named(name)
