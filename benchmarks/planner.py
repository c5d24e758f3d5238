"""Time to plan against sublayers and virtual stages: `python benchmarks/planner.py`.

Models of attention and expert sublayers in turn, of two sizes, with an embedding and a head; blocks are free (but in
`full`, where there is no choice), align="prefer", no memory limit. With V = 1 the schedule is 1F1B, else interleaved.
One thread; seconds are of the wall clock, `cpu_seconds` of the process, which other load on the machine does not
lengthen as much. `gap`: how far the slowest stage may be above the best there is.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, environment, write_json
from tabulate import tabulate

from attnres_fx.partition.costs.model_costs import ModelCosts, StreamCost, SublayerCost
from attnres_fx.partition.planner.request import PlanRequest
from attnres_fx.partition.planner.search import find_partition

SUBLAYERS = (50, 100, 200, 500, 1000, 2000)
VIRTUAL = (4, 8, 16, 32, 64, 128)
VARIANTS = ("block", "local", "full")
VALUE_BYTES = 16 << 20


def model_costs(count: int) -> ModelCosts:
    """Sublayers of 3 and 6 teraflops in turn; what they keep goes round in threes, so that no cut is as good as all."""
    chain = tuple(
        SublayerCost(str(i), 1e12 * (1 + i % 2), 2e12 * (1 + i % 2), (1 + i % 2) << 24, (1 + i % 3) << 26)
        for i in range(count)
    )
    before, after = SublayerCost("before", 1e9, 0.0, 1 << 30, 0), SublayerCost("after", 3e12, 6e12, 1 << 30, 1 << 28)
    return ModelCosts(chain, before, after, (StreamCost("main", 0, count, VALUE_BYTES),))


def measure(count: int, virtual: int, rounds: int, variant: Any, repeats: int) -> dict[str, Any]:
    """Median seconds of planning so many sublayers on so many virtual stages, `rounds` of them a rank."""
    ranks = virtual // rounds
    request = PlanRequest(
        costs=model_costs(count),
        num_stages=ranks,
        virtual_stages=rounds,
        num_microbatches=2 * ranks,
        schedule="1F1B" if rounds == 1 else "Interleaved1F1B",
        variant=variant,
    )
    wall, process = [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        plan = find_partition(request)
        wall.append(time.perf_counter() - started[0])
        process.append(time.process_time() - started[1])
    return {
        "sublayers": count,
        "virtual_stages": virtual,
        "stages_a_rank": rounds,
        "variant": variant,
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(process),
        "gap": plan.gap,
        "slowest_seconds": plan.slowest_seconds,
        "num_blocks": plan.block_layouts[0][1].num_blocks,
    }


def table(rows: Sequence[dict[str, Any]], virtual: Sequence[int]) -> str:
    """Seconds of process time, a column for every number of virtual stages, and the largest gap of each line."""
    lines = []
    kinds = dict.fromkeys((r["variant"], r["stages_a_rank"], r["sublayers"]) for r in rows)
    for kind in kinds:
        mine = {r["virtual_stages"]: r for r in rows if (r["variant"], r["stages_a_rank"], r["sublayers"]) == kind}
        seconds = [f"{mine[v]['cpu_seconds']:.2f}" if v in mine else "" for v in virtual]
        lines.append([*kind, *seconds, f"{max(r['gap'] for r in mine.values()):.1%}"])
    headers = ["variant", "V", "sublayers", *(f"{v} stages" for v in virtual), "largest gap"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sublayers", type=int, nargs="+", default=SUBLAYERS)
    parser.add_argument("--virtual", type=int, nargs="+", default=VIRTUAL, help="virtual stages of all ranks")
    parser.add_argument("--rounds", type=int, nargs="+", default=(1, 2), help="virtual stages a rank, V")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "planner.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measure(32, 4, 2, "block", 1)  # imports and first calls
    rows = [
        measure(count, virtual, rounds, variant, options.repeats)
        for variant in options.variants
        for rounds in options.rounds
        for count in options.sublayers
        for virtual in options.virtual
        if virtual <= count and virtual % rounds == 0
    ]
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, one thread, process seconds (median of {options.repeats}), load {load:.1f}\n")
    print(table(rows, options.virtual))
    write_json(
        options.output,
        {
            "benchmark": "planner",
            **environment(torch.device("cpu")),
            "threads": 1,
            "cpu_count": os.cpu_count(),
            "load_average": load,
            "repeats": options.repeats,
            "value_bytes": VALUE_BYTES,
            "plans": rows,
        },
    )
    return options.output


if __name__ == "__main__":
    main()
