"""What the command line takes: help on everything, example inputs from the model or by name, errors that say how."""

import argparse
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from attnres_fx.cli import _parser, main
from attnres_fx.cli_inputs import load, parse_input


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.last = nn.LayerNorm(8)

    def forward(self, ids, scale=None):
        x = self.embed(ids)
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        return self.last(x)


class TowerWithExample(Tower):
    @property
    def dummy_inputs(self):
        return {"ids": torch.zeros(3, 5, dtype=torch.long), "of_another_model": torch.zeros(1)}


@pytest.fixture
def factories(monkeypatch):
    module = types.ModuleType("factories_of_this_test")
    module.bare, module.with_example = Tower, TowerWithExample
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def parsers(parser, name="attnres-fx"):
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, found in action.choices.items():
                yield from parsers(found, command)


def test_every_option_of_every_command_has_a_help_text():
    found = dict(parsers(_parser()))
    assert {"inspect", "convert", "plan", "demo"} <= found.keys()
    without = [
        (command, action.dest)
        for command, parser in found.items()
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert not without
    for parser in found.values():
        assert parser.format_help()  # a stray % would raise


@pytest.mark.parametrize("text", ["ids=int64[40,50]:3..7", "ids=int32[2000]:3..7"])
def test_whole_numbers_are_drawn_from_the_range_with_both_its_ends(text):
    name, value = parse_input(text)
    assert name == "ids" and set(value.flatten().tolist()) == {3, 4, 5, 6, 7}


def test_an_input_is_of_the_dtype_and_sizes_that_it_names():
    _, image = parse_input("image=float16[2, 3,8,8]:-1.5..0.5")
    assert image.shape == (2, 3, 8, 8) and image.dtype == torch.float16
    assert -1.5 <= image.min() < -1 and 0 < image.max() <= 0.5
    _, mask = parse_input("mask=bool[2,16]")
    assert mask.dtype == torch.bool and mask.all()
    _, scalar = parse_input("t=float32[]")
    assert scalar.shape == ()


@pytest.mark.parametrize(
    "text", ["ids", "ids=int64", "ids=int65[2]", "ids=int64[2,x]", "ids=int64[2]:5", "ids=int64[2]:9..3", "=int64[2]"]
)
def test_an_input_that_cannot_be_read_is_named_with_its_option(text):
    with pytest.raises(ValueError, match=r"--input"):
        parse_input(text)


def test_the_example_is_the_models_own_dummy_inputs_as_far_as_forward_takes_them(factories):
    _, args, kwargs = load(f"{factories}:with_example", [])
    assert not args and list(kwargs) == ["ids"] and kwargs["ids"].shape == (3, 5)
    _, _, kwargs = load(f"{factories}:with_example", ["ids=int64[2,4]"])
    assert kwargs["ids"].shape == (2, 4)


def told(capsys, *arguments):
    assert main(list(arguments)) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_errors_about_the_example_name_the_option(factories, capsys):
    missing = told(capsys, "inspect", f"{factories}:bare")
    assert "--input" in missing and "needs ids" in missing
    unknown = told(capsys, "inspect", f"{factories}:bare", "--input", "idz=int64[2,4]")
    assert "--input idz" in unknown and "ids, scale" in unknown
    misfit = told(capsys, "inspect", f"{factories}:bare", "--input", "ids=float32[2,4]")
    assert "give another: --input" in misfit
    assert "Call the model itself with these arguments" in misfit and "Expected tensor for argument #1" in misfit


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("gpt2", "no file or folder 'gpt2' here"),
        ("no_such_module:make", "there is no module 'no_such_module' in"),
        ("factories_of_this_test:made", "has no 'made'; it has Tower"),
        ("factories_of_this_test:sized", "it needs width: name a function that takes none"),
        ("factories_of_this_test:number", "returned a int: it should return an nn.Module"),
        (__file__, "is a file of Python: name a function in it"),
    ],
)
def test_a_model_that_is_none_is_named_with_what_to_write(factories, place, said):
    module = sys.modules[factories]
    module.Tower = type("Tower", (Tower,), {"__module__": factories})
    module.sized, module.number = (lambda width: Tower()), (lambda: 3)
    with pytest.raises(ValueError, match=r"model|file") as error:
        load(place, [])
    assert said in str(error.value)


def test_a_module_that_cannot_import_another_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "imports_what_is_missing.py").write_text("import no_such_module\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load("imports_what_is_missing:make", [])


@pytest.mark.parametrize("option", ["--save", "--plot"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(option, tmp_path, capsys):
    for place, said in ((tmp_path / "none" / "file", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit):
            main(["plan", "no_such_module:make", "--stages", "2", option, str(place)])
        assert said in capsys.readouterr().err


def test_what_the_terminals_encoding_lacks_is_replaced():
    done = subprocess.run(
        [sys.executable, "-c", "from attnres_fx.cli import main; main(['convert', '--help'])"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--boundaries I,J,?" in done.stdout
