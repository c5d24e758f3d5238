"""Find the fastest launch of every kernel on this GPU and write the table the kernels look it up in.

    python benchmarks/tune.py                                               # the usual widths, bfloat16
    python benchmarks/tune.py --sources 9 10 --widths 7168 4096 --dtypes bfloat16 float32

A launch may change how fast a result comes, never a bit of it: a candidate whose bits differ from the default
launch's is refused and named. Records of other devices and problems stay in the table. More than 16 sources run as
groups of at most 16, each looked up by its own number.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from _measure import Clock, reason_of, summary, write_json
from _oracle import Case, make_case
from tabulate import tabulate
from torch import Tensor

from attnres_fx.ops import depth_attention

DIRECTIONS = ("forward", "backward")
KEY = ("device", "direction", "sources", "width", "dtype")
LaunchWith = Callable[[Any], AbstractContextManager[None]]
Record = dict[str, Any]


class Problem:
    """One read, with what each direction computes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.leaves = [t.detach().requires_grad_() for t in (*case.stacked.unbind(0), case.query, case.key_weight)]

    def forward(self) -> Tensor:
        *sources, query, key_weight = self.leaves
        return depth_attention(sources, query, key_weight, eps=self.case.eps)

    def results(self, direction: str) -> list[Tensor]:
        out = self.forward()
        if direction == "forward":
            return [out.detach()]
        return list(torch.autograd.grad(out, self.leaves, self.case.grad))

    def seconds(self, direction: str, clock: Clock) -> float:
        if direction == "forward":
            return clock.seconds(self.forward)
        held: list[Tensor] = []
        return clock.seconds(
            lambda: torch.autograd.grad(held.pop(), self.leaves, self.case.grad),
            before=lambda: held.append(self.forward()),
        )


def fastest(
    problem: Problem,
    direction: str,
    default: Any,
    candidates: Sequence[Any],
    launch_with: LaunchWith,
    clock: Clock,
    repeats: int,
) -> tuple[Any, dict[Any, float], dict[Any, str]]:
    """The best launch, microseconds of each that may be used, and why the others may not."""
    with launch_with(default):
        wanted = problem.results(direction)
    refused: dict[Any, str] = {}
    usable: list[Any] = []
    for launch in dict.fromkeys([default, *candidates]):
        try:
            with launch_with(launch):
                found = problem.results(direction)
        except Exception as error:  # too much shared memory, say
            refused[launch] = reason_of(error)
            continue
        if all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
            usable.append(launch)
        else:
            refused[launch] = "other bits than the default launch"
    times: dict[Any, list[float]] = {launch: [] for launch in usable}
    for _ in range(repeats + 2):
        for launch in usable:
            with launch_with(launch):
                times[launch].append(problem.seconds(direction, clock))
    medians = {launch: summary(taken[2:])["microseconds"] for launch, taken in times.items()}
    return min(usable, key=medians.__getitem__), medians, refused


def merged(table: Sequence[Record], found: Sequence[Record]) -> list[Record]:
    """`found` takes the place of records of the same problem; the rest stay; sorted, so that changes are readable."""
    by_key = {tuple(record[k] for k in KEY): record for record in (*table, *found)}
    return [by_key[key] for key in sorted(by_key)]


def main(arguments: list[str] | None = None) -> Path:
    from attnres_fx.ops.kernels import launch_with, tuning

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: with TRITON_INTERPRET=1")
    parser.add_argument("--smoke", action="store_true", help="one tiny problem")
    parser.add_argument("--sources", type=int, nargs="+", default=[2, 3, 5, 9, 10, 16])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096, 7168])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=None, help="the table the kernels read, by default")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    if options.smoke:
        options.sources, options.widths, options.tokens, options.repeats = [2], [64], 5, 1
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = options.output or tuning.table_path()
    table: list[Record] = json.loads(path.read_text()) if path.exists() else []
    clock = Clock(device)
    rows = []
    for dtype_name in options.dtypes:
        dtype = getattr(torch, dtype_name)
        for width in options.widths:
            for sources in options.sources:
                problem = Problem(make_case(sources, options.tokens, width, dtype, device))
                for direction in options.directions:
                    choices = tuning.candidates(direction, sources, width, dtype)
                    best, medians, refused = fastest(
                        problem, direction, tuning.DEFAULT, choices, launch_with, clock, options.repeats
                    )
                    record: Record = dict(zip(KEY, (name, direction, sources, width, dtype_name), strict=True))
                    record |= {"num_stages": best.num_stages, "programs_per_sm": best.programs_per_sm}
                    table = merged(table, [record])
                    write_json(path, table)
                    default = medians[tuning.DEFAULT]
                    rows.append({**record, "µs": medians[best], "default µs": default, "refused": len(refused)})
                    print(f"{record}: {medians[best]:.1f} µs, default {default:.1f}", flush=True)
                    for launch, reason in refused.items():
                        print(f"  refused {launch}: {reason}", flush=True)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))
    print(f"written to {path}")
    return path


if __name__ == "__main__":
    main()
