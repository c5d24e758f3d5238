"""Worlds of processes that run the cases of a pipeline."""

import os
import subprocess
import sys

from tests.support.paths import ROOT

RANKS = {"four": 4, "two": 2}  # in this order: two read the checkpoints of four


def run_world(suite, folder):
    command = [sys.executable, "-m", "tests.support.pipeline_workers", suite]
    ranks = RANKS[suite]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{suite}.{rank}.err").open("w"),
        )
        for rank in range(ranks)
    ]
    try:
        for worker in workers:
            worker.wait(timeout=300)
    finally:
        for worker in workers:
            worker.kill()
