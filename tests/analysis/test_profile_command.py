"""`attnres-fx profile`."""

import json

from attnres_fx.cli import main
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from tests.support.stream_text import tokens


def tiny():
    return SmallGPT(GPTConfig(layers=1, width=16, heads=2, context=8)), (tokens(),)


def squares(logits):
    return logits.square().mean()


def test_the_command_prints_draws_and_writes_what_the_function_returns(tmp_path, capsys):
    drawn, page, data = (tmp_path / f"depth.{kind}" for kind in ("png", "html", "json"))
    command = ["profile", f"{__name__}:tiny", "--loss", f"{__name__}:squares", "--reads"]
    assert main([*command, "--plot", str(drawn), "--html", str(page), "--json", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "early layers are" in printed and "mostly" in printed and f"drawn to {drawn}" in printed
    assert drawn.read_bytes().startswith(b"\x89PNG") and page.read_text().startswith("<!doctype html>")
    found = json.loads(data.read_text())
    assert found["loss"] > 0 and len(found["streams"][0]["sublayers"]) == 2


def test_a_loss_that_is_no_place_is_refused_by_name(capsys):
    assert main(["profile", f"{__name__}:tiny", "--loss", "squares"]) == 2
    assert "should name a function after a colon" in capsys.readouterr().err
