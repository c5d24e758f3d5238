"""The pipeline example as a user runs it: plan, train, lose a process, go on from a checkpoint, with other stages."""

import re
import shutil
import time

import pytest

from attnres_fx.cli import main
from tests.support import example_ranks

STEPS = 6


def make_plan(path, stages, *more):
    command = ["plan", "examples.pipeline_train:model", "--stages", str(stages), "--microbatches", "4"]
    speeds = ["--flops", "50e9", "--memory-bandwidth", "10GB", "--link-bandwidth", "1GB"]
    assert main([*command, *speeds, *more, "--save", str(path)]) == 0
    return path


def start(folder, plan, *options):
    arguments = ["--plan", plan, "--no-compile", "--steps", STEPS, "--every", 2, *options]
    return example_ranks.start("examples/pipeline_train.py", [str(a) for a in arguments], 2, folder)


def losses(rank):
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)\n", rank.out.read_text())}


def finish(ranks):
    for rank in ranks:
        assert rank.finish(240) == 0, rank.errors.read_text()
    return losses(ranks[0])


def wait_for_losses(ranks, number):
    deadline = time.monotonic() + 240
    while not ranks[0].out.exists() or len(losses(ranks[0])) < number:
        assert time.monotonic() < deadline and ranks[0].process.is_alive(), ranks[0].errors.read_text()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """A run of two ranks whose second is killed in its eighth step, and how the first ends."""
    folder = tmp_path_factory.mktemp("pipeline")
    plan = make_plan(folder / "plan.json", 2)
    ranks = start(folder, plan, "--checkpoint", folder / "saved", "--timeout", 20, "--steps", 100_000)
    try:
        wait_for_losses(ranks, STEPS + 1)  # no checkpoint is written after an odd one
        ranks[1].process.kill()
        begin = time.monotonic()
        code = ranks[0].finish(120)
        seconds = time.monotonic() - begin
    finally:
        for rank in ranks:
            rank.process.kill()
    return folder, plan, code, seconds, ranks[0]


def saved_until(step, folder, target):
    """The checkpoints of the lost run as they would be had it died while it wrote the one after `step`."""
    shutil.copytree(folder / "saved", target)
    for checkpoint in target.glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            (checkpoint / ".metadata").unlink(missing_ok=True)
    return target


@pytest.mark.slow
def test_a_lost_process_ends_the_others(lost):
    _, _, code, seconds, rank = lost
    assert code not in (0, None)
    assert seconds < 60
    assert "PipelineError" in rank.errors.read_text()


@pytest.mark.slow
def test_a_restart_goes_on_as_if_nothing_had_been(lost, tmp_path):
    folder, plan, *_, rank = lost
    wanted = losses(rank)
    assert wanted[STEPS] < wanted[1]
    found = finish(start(tmp_path, plan, "--checkpoint", saved_until(2, folder, tmp_path / "saved"), "--resume"))
    assert sorted(found) == list(range(3, STEPS + 1))
    for step, loss in found.items():
        assert loss == pytest.approx(wanted[step], abs=2e-6)


@pytest.mark.slow
def test_a_checkpoint_of_two_stages_goes_on_with_four(lost, tmp_path):
    folder, *_, rank = lost
    wanted = losses(rank)
    plan = make_plan(tmp_path / "plan.json", 2, "--virtual-stages", "2")
    found = finish(start(tmp_path, plan, "--checkpoint", saved_until(4, folder, tmp_path / "saved"), "--resume"))
    assert sorted(found) == [5, 6]
    for step, loss in found.items():
        assert loss == pytest.approx(wanted[step], abs=1e-4)
