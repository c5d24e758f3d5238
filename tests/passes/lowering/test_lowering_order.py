"""The lowering passes as one tuple, and the table of them in the documentation."""

from dataclasses import fields
from pathlib import Path

from attnres_fx import Lowering
from attnres_fx.passes.lowering.lower import LOWERING_PASSES

PAGE = Path(__file__).parents[3] / "docs" / "passes.md"
COLUMNS = ["pass", "what it does", "switch in `Lowering`", "default", "why it stands there"]


def documented():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line[:1] == "|"
    ]
    start = rows.index(COLUMNS) + 2
    table = []
    for row in rows[start:]:
        if len(row) != len(COLUMNS):
            break
        table.append(dict(zip(COLUMNS, row, strict=True)))
    return table


def default_in_words(step):
    if step.default != "auto":
        return {True: "on", False: "off"}[step.default]
    device = {"cuda": ": on a CUDA device", None: ""}[step.auto_device]
    return f'`"auto"`{device}'


def test_the_documented_table_says_what_the_tuple_says():
    says = [tuple(row[c] for c in COLUMNS if c != "what it does") for row in documented()]
    assert says == [(f"`{p.name}`", f"`{p.switch}`", default_in_words(p), p.reason) for p in LOWERING_PASSES]


def test_the_documented_table_says_which_passes_run_in_training_only():
    says = [row["what it does"].endswith("; training only") for row in documented()]
    assert says == [p.training_only for p in LOWERING_PASSES] and any(says)


def test_every_switch_belongs_to_one_pass():
    assert sorted(p.switch for p in LOWERING_PASSES) == sorted(f.name for f in fields(Lowering))
