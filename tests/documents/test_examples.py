"""Every example and a short demo run from the command line."""

import json
import runpy
import sys

import pytest

from attnres_fx.cli import main
from tests.support.paths import EXAMPLES

OPTIONS = {
    "convert_symbolic_trace": [],
    "convert_huggingface": [],
    "train_converted": [],
    "deploy_aot": ["--layers", "1"],
    "convert_vision_transformer": [],
    "train_trainer": [],
    "train_peft": [],
    "train_lightning": [],
    "convert_diffusers": [],
}
#: Packages of an example that are there by choice; without them it is skipped.
NEEDS = {
    "train_trainer": "accelerate",
    "train_peft": "peft",
    "train_lightning": "lightning",
    "convert_diffusers": "diffusers",
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.slow
def test_an_example_runs(name, monkeypatch, capsys):
    """As `python examples/NAME.py` does, without importing torch again."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *OPTIONS[name]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert "v_0" in told or "agree" in told, told


@pytest.mark.slow
def test_the_demo_agrees_and_writes_its_files(tmp_path, capsys):
    assert main(["demo", "--size", "tiny", "--steps", "3", "--more-steps", "2", "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "They agree to 1e-05 relative." in told
    assert {p.name for p in tmp_path.iterdir()} >= {"losses.json", "block.pt", "depth_weights.png", "depth_block.png"}
    curves = json.loads((tmp_path / "losses.json").read_text())["curves"]
    assert {name: curve[-1]["step"] for name, curve in curves.items()} == {
        "residual, 3 steps": 3,
        "residual, 5 steps": 5,
        "block, 3 steps": 3,
    }
    residual, block = (curves[name][-1]["validation"] for name in ("residual, 3 steps", "block, 3 steps"))
    assert f"block is {abs(residual - block):.4f} nats a byte" in told


@pytest.mark.slow
def test_an_error_is_one_paragraph_and_exit_code_two(capsys):
    assert main(["inspect", "no_such_module"]) == 2
    assert "module.path:function" in capsys.readouterr().err
    assert main(["convert", "examples.small_gpt:example", "--num-blocks", "99"]) == 2
    error = capsys.readouterr().err
    assert "num_blocks=99" in error.replace("\n", " ")
    assert "Traceback" not in error
