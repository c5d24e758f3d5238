"""Converted models in real pipelines over gloo, against the same model in one process.

What runs in processes is in model_pipeline_workers.py; the tests here read what it found.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.model_pipeline_workers import CASES
from tests.support.paths import ROOT

RANKS = {"two": 2, "four": 4}
TOLERANCE = 1e-5


def run_world(suite, folder):
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.support.model_pipeline_workers", suite, str(RANKS[suite]), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"models.{suite}.err").open("w"),
        start_new_session=True,
    )
    try:
        worker.wait(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """What every case found, rank by rank. Under xdist one worker runs the worlds and the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "model-pipeline"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 900
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        try:
            for suite in RANKS:
                run_world(suite, folder)
        finally:
            done.touch()
    found = {}
    for suite, ranks in RANKS.items():
        for rank in range(ranks):
            for line in (folder / f"models.{suite}.{rank}.jsonl").read_text().splitlines():
                name, result, _ = json.loads(line)
                found.setdefault((suite, name), []).append(result)
    return found


def numbers(result):
    """Every figure in nested results, by its path."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield from ((f"{key}: {path}", found) for path, found in numbers(value))
        else:
            yield key, value


@pytest.mark.parametrize(("suite", "name"), [(s, n) for s in CASES for n in CASES[s]])
def test_a_pipeline_computes_what_one_process_does(worlds, suite, name):
    results = worlds[suite, name]
    assert len(results) == RANKS[suite]
    for result in results:
        assert "error" not in result, result["error"]
        figures = dict(numbers(result))
        assert figures
        for path, value in figures.items():
            if path.endswith(("bytes", "order")):
                assert value is True, path
            elif path.endswith("held"):
                assert value == 0, path
            else:
                assert value <= TOLERANCE, path
