"""One process of a pipeline: runs the cases of a suite in order and writes what it found, a JSON line a case.

python -m tests.support.pipeline_workers SUITE RANK WORLD FOLDER
"""

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.pipeline_cases import checkpoints, data_parallel, failures, lost_processes, steps, training
from tests.support.pipeline_cases.tools import CASES as REGISTERED

#: In this order: after a process is lost nothing can follow.
MODULES = (steps, training, failures, data_parallel, checkpoints, lost_processes)
_PLACES = {module.__name__: i for i, module in enumerate(MODULES)}
CASES = {
    suite: dict(sorted(cases.items(), key=lambda entry: _PLACES[entry[1][0].__module__]))
    for suite, cases in REGISTERED.items()
}


def main(suite, rank, world, folder):
    torch.set_num_threads(1)
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
    os._exit(0)  # what compiled hooks and a dead neighbour leave behind keeps the groups from going down in order


if __name__ == "__main__":
    checkpoints.FOLDER = Path(sys.argv[4])
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), checkpoints.FOLDER)
