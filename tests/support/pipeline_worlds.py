"""Worlds of processes that run the cases of pipelines."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback

from tests.support.paths import ROOT


def results_of_worlds(module, ranks, base, name):
    """What every case found, rank by rank. Under xdist one worker runs the worlds and the others wait.

    Args:
        module: Run with a folder, it forks the processes of every suite, which write to `suite.rank.jsonl` there.
        ranks: Of each suite.
        base: A folder for temporary files, which all workers of xdist see.
        name: Of the folder made there.
    """
    folder = base / name
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 1000
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        try:
            _run_worlds(module, folder)
        finally:
            done.touch()
    found = {}
    for suite, count in ranks.items():
        for rank in range(count):
            for line in (folder / f"{suite}.{rank}.jsonl").read_text().splitlines():
                case, result, _ = json.loads(line)
                found.setdefault((suite, case), []).append(result)
    return found


def _run_worlds(module, folder):
    parent = subprocess.Popen(
        [sys.executable, "-m", module, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "err").open("w"),
        start_new_session=True,
    )
    try:
        parent.wait(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def shared_folder(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def in_processes(world, run):
    """`run(rank)` in that many forked processes; returns when all have ended."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                run(rank)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)  # what compiled hooks and a dead neighbour leave keeps groups from going down in order
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
