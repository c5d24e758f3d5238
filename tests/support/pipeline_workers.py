"""Processes of a pipeline: each runs the cases of its suite in order and writes what it found, a JSON line a case.

They are forked of one, which has imported all there is.

python -m tests.support.pipeline_workers FOLDER
"""

import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.pipeline_cases import (
    checkpoints,
    data_parallel,
    disagreements,
    failures,
    lost_processes,
    steps,
    training,
)
from tests.support.pipeline_cases.tools import CASES as REGISTERED
from tests.support.pipeline_worlds import in_processes

#: In this order: after a process is lost nothing can follow.
MODULES = (steps, training, failures, disagreements, data_parallel, checkpoints, lost_processes)
_PLACES = {module.__name__: i for i, module in enumerate(MODULES)}
CASES = {
    suite: dict(sorted(cases.items(), key=lambda entry: _PLACES[entry[1][0].__module__]))
    for suite, cases in REGISTERED.items()
}

RANKS = {"four": 4, "two": 2}  # in this order: two read the checkpoints of four


def main(folder):
    torch.set_num_threads(1)
    checkpoints.FOLDER = folder
    for suite, world in RANKS.items():
        in_processes(world, lambda rank, suite=suite, world=world: run_rank(suite, rank, world, folder))


def run_rank(suite, rank, world, folder):
    file = f"file://{folder / suite}.group"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    with (folder / f"{suite}.{rank}.jsonl").open("w") as out:
        for name, (function, options) in CASES[suite].items():
            start = time.time()
            try:
                found = function(**options)
            except Exception:
                found = {"exception": traceback.format_exc()}
            out.write(json.dumps([name, found, time.time() - start]) + "\n")
            out.flush()
    if suite != "four":  # where one has died
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
