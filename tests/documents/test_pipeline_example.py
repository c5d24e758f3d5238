"""The pipeline example as a user runs it: plan, train, lose a process, go on from a checkpoint, with other stages."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from attnres_fx.cli import main
from tests.support.paths import ROOT

STEPS = 6


def make_plan(path, stages, *more):
    command = ["plan", "examples.pipeline_train:model", "--stages", str(stages), "--microbatches", "4"]
    speeds = ["--flops", "50e9", "--memory-bandwidth", "10GB", "--link-bandwidth", "1GB"]
    assert main([*command, *speeds, *more, "--save", str(path)]) == 0
    return path


def start(plan, ranks, *options):
    """One process a rank, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(ROOT / "examples" / "pipeline_train.py"), "--plan", str(plan), "--no-compile"]
    return [
        subprocess.Popen(
            [*command, "--steps", str(STEPS), *map(str, options)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def losses(text):
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", text)}


def finish(workers):
    ended = [worker.communicate(timeout=240) for worker in workers]
    for worker, (_, errors) in zip(workers, ended, strict=True):
        assert worker.returncode == 0, errors
    return losses(ended[0][0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A plan for two ranks, and the losses and checkpoints of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("pipeline")
    plan = make_plan(folder / "plan.json", 2)
    found = finish(start(plan, 2, "--checkpoint", folder / "saved", "--every", 2))
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1]
    return folder, plan, found


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_a_restart_goes_on_as_if_nothing_had_been(trained, tmp_path):
    _, plan, wanted = trained
    options = ("--checkpoint", tmp_path / "saved", "--every", 2)
    workers = start(plan, 2, *options, "--timeout", 20, "--steps", 100_000)
    for line in workers[0].stdout:
        if line.startswith("step 3"):
            workers[1].send_signal(signal.SIGKILL)
            break
    begin = time.monotonic()
    _, errors = workers[0].communicate(timeout=120)
    workers[1].communicate()
    assert workers[0].returncode != 0
    assert time.monotonic() - begin < 60
    assert "PipelineError" in errors
    for late in sorted((tmp_path / "saved").glob("step-*"))[1:]:  # steps it did after the third
        (late / ".metadata").unlink(missing_ok=True)
    found = finish(start(plan, 2, *options, "--resume"))
    assert sorted(found) == list(range(3, STEPS + 1))
    for step, loss in found.items():
        assert loss == pytest.approx(wanted[step], abs=2e-6)


@pytest.mark.slow
def test_a_checkpoint_of_two_stages_goes_on_with_four(trained, tmp_path):
    folder, _, wanted = trained
    (folder / "saved" / "step-000006" / ".metadata").rename(folder / "saved" / "step-000006" / "kept")
    try:
        plan = make_plan(tmp_path / "plan.json", 2, "--virtual-stages", "2")
        found = finish(start(plan, 2, "--checkpoint", folder / "saved", "--every", 100, "--resume"))
    finally:
        (folder / "saved" / "step-000006" / "kept").rename(folder / "saved" / "step-000006" / ".metadata")
    assert sorted(found) == [5, 6]
    for step, loss in found.items():
        assert loss == pytest.approx(wanted[step], abs=1e-4)
