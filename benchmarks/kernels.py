"""Depth attention forward, backward and both: ours, the definition, and every public implementation that imports.

    python benchmarks/kernels.py                                        # every case, on the GPU
    python benchmarks/kernels.py --cases 9x8192x7168 10x32768x4096 --only ours fla-core
    python benchmarks/kernels.py --device cpu --smoke                   # tiny shapes: does it run

Each implementation is held to a float64 oracle (output and every gradient) before it is timed. Times are medians of
interleaved runs between CUDA events, L2 flushed before each; for one token, of calls inside a CUDA graph. Bytes are
counted, not measured: forward (S+1) N D, backward (2S+1) N D, and two float32 statistics a row and source in each.
"copy" is a large `copy_` timed in the same rounds.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _measure import (
    COPY_BYTES,
    Clock,
    captured,
    copy_of,
    counted_bytes,
    default_output,
    environment,
    reason_of,
    summary,
    write_json,
)
from _oracle import Case, Errors, errors, make_case
from _peers import MAKERS, PACKAGES, Implementation, load
from tabulate import tabulate
from torch import Tensor

SOURCES = (2, 5, 9, 17, 25, 33)
SHAPES = ((8192, 7168), (32768, 4096), (8192, 2048), (1024, 7168), (1, 7168))
SMOKE = ((2, 7, 128), (5, 1, 64))
DIRECTIONS = ("forward", "backward", "both")


class Runner:
    """One implementation on one case: leaves made once, called again and again."""

    def __init__(self, implementation: Implementation, case: Case) -> None:
        self.implementation, self.case = implementation, case
        if implementation.stacked:
            self.sources: Any = case.stacked.detach().requires_grad_()
            self.leaves: list[Tensor] = [self.sources]
        else:
            self.sources = [s.detach().requires_grad_() for s in case.stacked.unbind(0)]
            self.leaves = list(self.sources)
        self.query = case.query.detach().requires_grad_()
        gain = case.key_weight if implementation.key_gain else torch.ones_like(case.key_weight)
        self.key_weight = gain.detach().requires_grad_(implementation.key_gain)
        self.leaves += [self.query, self.key_weight] if implementation.key_gain else [self.query]
        self.out: Tensor | None = None

    def forward(self) -> None:
        self.out = self.implementation.call(self.sources, self.query, self.key_weight, self.case.eps)

    def inference(self) -> None:
        with torch.no_grad():
            self.implementation.call(self.sources, self.query, self.key_weight, self.case.eps)

    def backward(self) -> tuple[Tensor, ...]:
        assert self.out is not None
        out, self.out = self.out, None
        return torch.autograd.grad(out, self.leaves, self.case.grad)

    def both(self) -> None:
        self.forward()
        self.backward()

    def errors(self) -> Errors:
        self.forward()
        assert self.out is not None
        out = self.out.detach()
        grads = self.backward()
        gain_grad = grads[-1] if self.implementation.key_gain else None
        query_grad = grads[-2] if self.implementation.key_gain else grads[-1]
        sources = grads[0].unbind(0) if self.implementation.stacked else grads[: self.case.shape[0]]
        return errors(self.case, self.key_weight, out, sources, query_grad, gain_grad)

    def timers(self, clock: Clock) -> dict[str, Callable[[], float]]:
        """How to take one sample of each direction."""
        if clock.cuda and self.case.shape[1] == 1:
            runs = {"forward": self.inference, "both": self.both}  # a backward alone cannot be replayed
            graphs = {name: captured(run) for name, run in runs.items()}
            return {name: lambda g=g: clock.graph_seconds(g) for name, g in graphs.items()}
        return {
            "forward": lambda: clock.seconds(self.forward),
            "backward": lambda: clock.seconds(self.backward, before=self.forward),
            "both": lambda: clock.seconds(self.both),
        }


def prepare(implementation: Implementation, case: Case, clock: Clock) -> tuple[dict[str, Any], Any]:
    """Verify, warm up, and return what to report with the timers, or with None where it is not to be timed."""
    report: dict[str, Any] = {"implementation": implementation.name, "note": implementation.note}
    reason = implementation.refuses(*case.shape, case.stacked.dtype)
    if reason is not None:
        return {**report, "status": "cannot", "reason": reason}, None
    try:
        runner = Runner(implementation, case)
        found = runner.errors()
        report["errors"] = asdict(found)
        wrong = found.failure(case.stacked.dtype)
        if wrong is not None:
            return {**report, "status": "wrong", "reason": wrong}, None
        timers = runner.timers(clock)
        for _ in range(3):
            for timer in timers.values():
                timer()
        runner.out = None
    except torch.OutOfMemoryError:
        return {**report, "status": "skipped", "reason": "does not fit in memory"}, None
    except Exception as error:  # whatever a peer raises is its result
        if "illegal memory access" in str(error):
            raise  # the CUDA context is lost, and with it every later figure
        return {**report, "status": "failed", "reason": reason_of(error)}, None
    return {**report, "status": "timed"}, timers


def measure(
    shape: tuple[int, int, int], implementations: list[Implementation], clock: Clock, copy: Any, repeats: int
) -> dict[str, Any]:
    """All implementations on one shape, in interleaved rounds."""
    result: dict[str, Any] = dict(zip(("sources", "tokens", "width"), shape, strict=True))
    result["dtype"] = "bfloat16"
    try:
        case = make_case(*shape, torch.bfloat16, clock.device)
    except torch.OutOfMemoryError:
        return {**result, "status": "skipped", "reason": "its inputs do not fit in memory", "implementations": []}
    torch.compiler.reset()  # or the case after the eighth would meet Dynamo's limit and run eagerly
    prepared = []
    for implementation in implementations:
        prepared.append(prepare(implementation, case, clock))
        gc.collect()
        if clock.cuda:
            torch.cuda.empty_cache()
        print(f"  {shape} {implementation.name}: {prepared[-1][0]['status']}", flush=True)
    times: dict[tuple[int, str], list[float]] = {}
    copies: list[float] = []
    for _ in range(repeats):
        copies.append(clock.seconds(copy))
        for i, (report, timers) in enumerate(prepared):
            for direction, timer in (timers or {}).items():
                try:
                    times.setdefault((i, direction), []).append(timer())
                except torch.OutOfMemoryError:
                    report |= {"status": "skipped", "reason": "does not fit in memory"}
                    prepared[i] = (report, None)
                    break
    bandwidth = 2 * copy_bytes(clock) / (summary(copies)["microseconds"] / 1e6)
    for (i, direction), taken in times.items():
        moved = counted_bytes(direction, *shape, case.stacked.element_size())
        timing = summary(taken)
        rate = moved / (timing["microseconds"] / 1e6)
        prepared[i][0][direction] = {**timing, "bytes": moved, "bytes_per_second": rate, "of_copy": rate / bandwidth}
    method = "64 calls in a CUDA graph" if clock.cuda and shape[1] == 1 else "events, cold L2"
    result |= {"status": "measured", "method": method if clock.cuda else "host clock"}
    return {**result, "copy_bytes_per_second": bandwidth, "implementations": [report for report, _ in prepared]}


def copy_bytes(clock: Clock) -> int:
    return COPY_BYTES if clock.cuda else 1 << 22


def table(result: dict[str, Any]) -> str:
    rows = []
    for report in result["implementations"]:
        row: dict[str, Any] = {"implementation": report["implementation"]}
        for direction in DIRECTIONS:
            timing = report.get(direction)
            row[f"{direction} µs"] = f"{timing['microseconds']:.1f}" if timing else "-"
            row[f"{direction} of copy"] = f"{100 * timing['of_copy']:.0f}%" if timing else "-"
        row["remark"] = report.get("reason", report["note"])
        rows.append(row)
    copy = result.get("copy_bytes_per_second", 0.0) / 1e9
    head = f"S={result['sources']} N={result['tokens']} D={result['width']} {result['dtype']}, copy {copy:.0f} GB/s"
    if result["status"] != "measured":
        return f"{head}: {result['reason']}"
    return f"{head}, {result['method']}\n" + tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def parse_case(text: str) -> tuple[int, int, int]:
    sources, tokens, width = (int(part) for part in text.split("x"))
    return sources, tokens, width


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--cases", nargs="+", type=parse_case, metavar="SxNxD")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--only", nargs="+", default=[], help=f"beginnings of names: {', '.join(MAKERS)}")
    parser.add_argument("--skip", nargs="+", default=[], help="likewise, left out")
    parser.add_argument("--output", type=Path, help="JSON file; benchmarks/results/ by default")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; try --device cpu --smoke")
    device = torch.device(options.device)
    cases = options.cases or (SMOKE if options.smoke else [(s, n, d) for n, d in SHAPES for s in SOURCES])
    repeats = options.repeats or (2 if options.smoke else 30)
    output = options.output or default_output("kernels", device, options.smoke)
    implementations, missing = load(device, options.only, options.skip)
    clock = Clock(device)
    copy = copy_of(device, copy_bytes(clock))
    content: dict[str, Any] = {"benchmark": "kernels", **environment(device, PACKAGES), "repeats": repeats}
    content |= {"not_here": missing, "cases": []}
    for shape in cases:
        result = measure(shape, implementations, clock, copy, repeats)
        content["cases"].append(result)
        write_json(output, content)
        print(f"\n{table(result)}\n", flush=True)
        if clock.cuda:
            torch.cuda.empty_cache()
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    print(f"written to {output}")
    return output


if __name__ == "__main__":
    main()
