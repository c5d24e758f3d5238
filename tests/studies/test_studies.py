"""Each study runs at its smallest size; finished runs are kept; figures come from the files that are committed."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from attnres_fx.demo.small_gpt import SmallGPT
from studies import blocks, figures, gain, gain_answer, retrofit, routing, shapes
from studies.core import command
from studies.core.methods import ABLATIONS, METHODS
from studies.core.results import FOLDER, Results
from studies.core.runs import Run
from studies.core.sizes import SIZES
from tests.support.paths import ROOT

COMMITTED = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", figures.STUDIES)
@pytest.mark.slow
def test_a_study_runs_and_its_figure_is_drawn(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # weights that a study keeps go to ./build
    few = ("as it is", "block, queries 10 times", "as it is, original beside")
    monkeypatch.setattr(retrofit, "ARMS", {arm: retrofit.ARMS[arm] for arm in few})
    study = figures.study_named(name)
    assert command.main(study, ["--size", "tiny", "--results", str(tmp_path)]) == 0
    record = next(iter(json.loads((tmp_path / f"{name}-tiny.json").read_text())["runs"].values()))
    assert math.isfinite(record["loss"]) and record["curve"][-1][0] == record["run"]["steps"]
    assert record["made"].keys() >= {"date", "commit", "machine", "torch", "attnres_fx", "python"}
    assert study.tables(Results(tmp_path, name, "tiny")) in capsys.readouterr().out
    assert figures.main(["--results", str(tmp_path), "--output", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}-tiny.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_a_committed_file_has_its_figure_and_draws_it_again(path, tmp_path):
    assert (figures.FIGURES / f"{path.stem}.png").is_file()
    name, _, size = path.stem.rpartition("-")
    figure = figures.study_named(name).draw(Results(FOLDER, name, size))
    assert any(axes.has_data() for axes in figure.axes)


def test_every_figure_in_the_docs_is_of_a_committed_file():
    drawn = {p.stem for p in figures.FIGURES.glob("*.png")}
    assert drawn == {p.stem for p in COMMITTED} and drawn
    assert all(f"figures/{name}.png" in (ROOT / "docs" / "evidence.md").read_text() for name in drawn)


def fake_study(plan=None):
    runs = [Run(method="residual", seed=s, lr=0.1, steps=1) for s in range(3)]
    return command.Study(
        name="fake",
        question="?",
        plan=plan or (lambda size, results: iter(runs)),
        tables=lambda r: "",
        draw=lambda r: None,
    )


def test_an_interrupted_study_goes_on_with_what_is_not_finished(tmp_path, monkeypatch):
    done, fail_at = [], [1]

    def do_run(run, size, **_):
        if run.seed in fail_at:
            raise KeyboardInterrupt
        done.append(run.seed)
        return {"run": {"seed": run.seed}}

    monkeypatch.setattr(command, "do_run", do_run)
    with pytest.raises(KeyboardInterrupt):
        command.do_study(fake_study(), "tiny", tmp_path)
    assert done == [0]
    fail_at.clear()
    first = json.loads((tmp_path / "fake-tiny.json").read_text())["runs"]
    results = command.do_study(fake_study(), "tiny", tmp_path)
    assert done == [0, 1, 2]
    assert len(results.runs) == 3 and next(iter(results.runs.values())) == next(iter(first.values()))


def test_a_plan_sees_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "do_run", lambda run, size, **_: {"run": {}, "loss": -run.lr})

    def plan(size, results):
        yield Run(method="residual", seed=0, lr=0.5, steps=1)
        yield Run(method="block", seed=0, lr=-2 * next(iter(results.runs.values()))["loss"], steps=1)

    assert list(command.do_study(fake_study(plan), "tiny", tmp_path).runs) == [
        "residual, seed 0, lr 0.5, steps 1",
        "block, seed 0, lr 1, steps 1",
    ]


def test_keys_say_all_that_differs():
    runs = [
        Run(method="residual", seed=0, lr=0.1, steps=1),
        Run(method="residual", seed=0, lr=0.1, steps=1, query_rate=10.0),
        Run(method="residual", seed=0, lr=0.1, steps=1, start=5),
        Run(method="residual", seed=0, lr=0.1, steps=1, width=8, hidden=3),
        Run(method="residual", seed=0, lr=0.1, steps=1, objective="loss and original"),
    ]
    assert len({r.key for r in runs}) == len(runs)


def test_the_multiplier_is_how_many_times_the_steps_the_residual_model_needs():
    lengths = {n: {s: (3.0 + 0.1 * s) * n**-0.2 for s in range(3)} for n in (50, 100, 200)}
    twice = dict(lengths[200])
    assert gain_answer.multiplier(lengths, twice, 100) == pytest.approx((2.0, 2.0, 2.0))
    uneven = twice | {2: lengths[100][2]}
    value, low, high = gain_answer.multiplier(lengths, uneven, 100)
    assert value == pytest.approx(gain_answer.multiplier(lengths, dict(sorted(uneven.items())), 100)[0])
    assert 1.0 < low < value < high == pytest.approx(2.0)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_shapes_have_equal_parameters(size):
    size = SIZES[size]
    counts = []
    for run in shapes.plan(size, None):
        if run.method == "residual":
            first, second = (
                parameters(replace(size.model, layers=n, width=run.width, hidden=run.hidden)) for n in (1, 2)
            )
            counts.append(first + (run.layers - 1) * (second - first))
    assert len(counts) == 25
    assert max(counts) / min(counts) < 1.02


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in SmallGPT(config).parameters())


def test_the_learning_rate_of_each_method_is_its_own_best(tmp_path, monkeypatch):
    best = {"residual": 6e-3, "block": 3e-3, "local": 12e-3, "full": 3e-3, "static": 6e-3, "mhc": 3e-3}

    def do_run(run, size, **_):
        return {"run": asdict(run), "loss": abs(run.lr - best[run.method])}

    monkeypatch.setattr(command, "do_run", do_run)
    runs = command.do_study(gain.STUDY, "cpu", tmp_path).runs.values()
    assert {(r["run"]["method"], r["run"]["lr"]) for r in runs if r["run"]["seed"] == 2} == set(best.items())
    assert {r["run"]["steps"] for r in runs if r["run"]["method"] == "residual"} == {800, 1200}
    assert len(runs) == 6 * 5 + 3


def test_kinds_of_tokens_are_a_partition():
    masks = routing.kinds(torch.tensor([list(b"x_1 \n+")]))
    found = {name: mask[0].int().tolist() for name, mask in masks.items()}
    assert found == {
        "names": [1, 1, 0, 0, 0, 0],
        "digits": [0, 0, 1, 0, 0, 0],
        "whitespace": [0, 0, 0, 1, 1, 0],
        "other": [0, 0, 0, 0, 0, 1],
    }


def test_every_arm_has_a_rival_that_is_trained_as_long_for_the_same_thing():
    size = SIZES["cpu"]
    for arm in retrofit.ARMS:
        run, rival = (retrofit.run_of(a, 0, size) for a in (arm, retrofit.rival(arm)))
        assert (rival.method, rival.steps, rival.objective) == ("residual", run.steps, run.objective)


def test_blocks_of_every_size_are_in_the_table():
    assert set(blocks.sizes_of_blocks().values()) == {1, 2, 4, 6, 8, 12, 24}
    assert set(blocks.sizes_of_blocks()) < set(METHODS)


def test_what_a_read_does_otherwise_is_compared_with_the_same_blocks():
    for name, config in ABLATIONS.items():
        assert METHODS[name] is config
        assert config.block_size == (1 if config.window else 4)
    runs = blocks.plan(SIZES["cpu"], None)
    assert {r.method for r in runs} >= {"residual", "block of 1", "block of 4", *ABLATIONS}
