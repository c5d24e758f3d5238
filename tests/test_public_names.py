"""The names at the top of the package: each is there, comes from where it says, and costs nothing until it is used."""

import importlib
import subprocess
import sys

import pytest

import attnres_fx
from attnres_fx.passes.lowering.read_calls import OPERATORS
from tests.support.paths import ROOT

NAMES = sorted(set(attnres_fx.__all__) - {"__version__", "errors", "ops"})
HEAVY = ("torch", "transformers", "triton", "torch._inductor.compile_fx", "matplotlib", "attnres_fx.partition")


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_the_object_of_its_home_module(name):
    value = getattr(attnres_fx, name)
    assert getattr(importlib.import_module(value.__module__), name) is value
    assert value.__module__.startswith("attnres_fx."), "made here, not handed on"


def test_dir_lists_every_public_name_and_no_other_is_made_up():
    assert set(attnres_fx.__all__) <= set(dir(attnres_fx))
    with pytest.raises(AttributeError, match="no attribute 'converts'"):
        _ = attnres_fx.converts


def test_importing_the_package_alone_is_light():
    program = f"import sys, attnres_fx; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


IMPORTS = {
    "the package after torch": "import torch, attnres_fx",
    "a public name before torch": "from attnres_fx import AttnResConfig; import torch",
    "the operators alone": "import attnres_fx.ops, torch",
}


@pytest.mark.parametrize("imports", IMPORTS)
@pytest.mark.slow
def test_every_operator_that_a_graph_may_hold_is_registered_by(imports):
    in_graphs = {str(o).split(".")[1] for o in OPERATORS} | {"parameters"}
    code = f"{IMPORTS[imports]}; [getattr(torch.ops.attnres_fx, n) for n in {sorted(in_graphs)}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["--version"]], ids=" ".join)
def test_the_command_line_says_what_it_takes_without_torch(arguments):
    code = f"""
import sys
from attnres_fx.cli import main
try:
    main({arguments!r})
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.split()[-1] == "False", done.stderr
