"""Depth attention alone on the CPU: eager and Inductor, beside the stacked definition one would first write.

    python benchmarks/cpu_operator.py                                    # S=9, N=4096, D=1024, float32
    python benchmarks/cpu_operator.py --dtype bfloat16 --sources 5 17 --repeats 9

In one process: the stacked definition (torch.stack, rms_norm, einsum, softmax, einsum) eager and under Inductor,
this library's definition source by source under Inductor with the backward that autograd derives, and the operator
eager and under Inductor. Runs are interleaved and rotated, the compiled ones first and the eager ones after them
(what frees a gigabyte slows its neighbours down); medians, and how many times faster than the stacked
definition run the same way. "compile s" is the first call, forward and backward, with the compiler's caches off;
"loops" counts the parallel loops of the generated C++, forward + backward; "copy" copies all sources once into
memory already held: far beyond 2 x the bytes / the memory's bandwidth, the machine was busy with other work.
Gradients are allocated in every run, so page faults are part of the time for all alike.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch._inductor.config
from tabulate import tabulate
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from attnres_fx.ops import depth_attention
from attnres_fx.ops.read_tensors import read_of
from attnres_fx.ops.reference import definition

EPS = 1e-6
STACKED = "stacked definition, "
Read = Callable[..., Tensor]


def stacked(query: Tensor, key_weight: Tensor, *sources: Tensor) -> Tensor:
    values = torch.stack(sources)
    keys = F.rms_norm(values.float(), values.shape[-1:], key_weight, EPS)
    weights = torch.einsum("snd,d->sn", keys, query).softmax(0)
    return torch.einsum("sn,snd->nd", weights, values.float()).to(values.dtype)


def ours(query: Tensor, key_weight: Tensor, *sources: Tensor) -> Tensor:
    return depth_attention(sources, query, key_weight, eps=EPS)


def by_source(query: Tensor, key_weight: Tensor, *sources: Tensor) -> Tensor:
    return definition(*read_of(sources, query, key_weight, EPS, 1.0))


def base_of(name: str) -> str:
    return STACKED + name.rsplit(", ", 1)[1]


def device_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Problem:
    """The tensors of one read: query, key gain and sources as leaves, and the gradient of the result."""

    leaves: list[Tensor]
    grad_out: Tensor

    @property
    def sources(self) -> list[Tensor]:
        return self.leaves[2:]

    def forward(self, read: Read) -> Tensor:
        with torch.no_grad():
            return read(*self.leaves)

    def both(self, read: Read) -> tuple[Tensor, ...]:
        """The read, and its gradients."""
        out = read(*self.leaves)
        return (out, *torch.autograd.grad(out, self.leaves, self.grad_out))


def problem_of(count: int, tokens: int, width: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    sources = [torch.randn(tokens, width).to(dtype).requires_grad_() for _ in range(count)]
    query = torch.randn(width).div(width**0.5).requires_grad_()
    key_weight = torch.randn(width).mul(0.3).add(1).requires_grad_()
    return Problem([query, key_weight, *sources], torch.randn(tokens, width).to(dtype))


def compile_reads(problem: Problem) -> tuple[dict[str, Read], dict[str, float], dict[str, str]]:
    """The compiled reads, seconds of the first call of each, and the loops of its code; all by name."""
    reads: dict[str, Read] = {}
    compile_seconds: dict[str, float] = {}
    loops: dict[str, str] = {}
    for name, plain in (
        (STACKED + "Inductor", stacked),
        ("source by source, Inductor", by_source),
        ("attnres_fx, Inductor", ours),
    ):
        read = torch.compile(plain, fullgraph=True, dynamic=False)
        start = time.perf_counter()
        _, code = run_and_get_code(lambda read=read: problem.both(read))
        compile_seconds[name] = time.perf_counter() - start
        if torch.get_num_threads() > 1:  # one thread leaves no mark to count
            loops[name] = " + ".join(str(text.count("#pragma omp for")) for text in code)
        reads[name] = read
    return reads, compile_seconds, loops


def check_agreement(problem: Problem, reads: dict[str, Read]) -> None:
    """Raise AssertionError where a read or a gradient differs from the stacked definition's; warms all of them up."""
    expected = problem.both(stacked)
    for read in reads.values():
        for a, b in zip(problem.both(read), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3 * float(b.detach().abs().max()))
        problem.forward(read)


def measure(count: int, tokens: int, width: int, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """One row a way to compute the read; checks that all of them agree before it times them."""
    torch._dynamo.reset()
    problem = problem_of(count, tokens, width, dtype)
    eager: dict[str, Read] = {STACKED + "eager": stacked, "attnres_fx, eager": ours}
    compiled, compile_seconds, loops = compile_reads(problem)
    reads = {**eager, **compiled}
    check_agreement(problem, reads)

    copied = [torch.empty_like(s) for s in problem.sources]
    copies: list[float] = []
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in reads}
    for names in (list(compiled), list(eager)):
        for i in range(repeats):
            if names[0] in compiled:
                pairs = list(zip(copied, problem.sources, strict=True))
                copies.append(seconds(lambda pairs=pairs: [c.copy_(s.detach()) for c, s in pairs]))
            for name in names[i % len(names) :] + names[: i % len(names)]:
                read = reads[name]
                times[name][0].append(seconds(lambda read=read: problem.forward(read)))
                times[name][1].append(seconds(lambda read=read: problem.both(read)))
    return [
        *as_rows(times, compile_seconds, loops),
        {"read": "copy of the sources", "forward ms": 1e3 * statistics.median(copies)},
    ]


def as_rows(
    times: dict[str, tuple[list[float], list[float]]], compile_seconds: dict[str, float], loops: dict[str, str]
) -> list[dict[str, object]]:
    """One row a way to compute the read, the slowest first: medians, and how they compare with the stacked definition.

    times: seconds of forward, and of forward and backward, by name. compile_seconds: of the first call, by name.
    """
    medians = {name: tuple(1e3 * statistics.median(t) for t in pair) for name, pair in times.items()}
    return [
        {
            "read": name,
            "compile s": compile_seconds.get(name),
            "loops": loops.get(name),
            "forward ms": medians[name][0],
            "forward times faster": medians[base_of(name)][0] / medians[name][0],
            "forward+backward ms": medians[name][1],
            "f+b times faster": medians[base_of(name)][1] / medians[name][1],
        }
        for name in sorted(times, key=lambda name: -medians[name][1])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, nargs="+", default=[9])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "cpu_operator.json")
    options = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    run = {
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": str(date.today()),
        "repeats": options.repeats,
        "load at start": os.getloadavg()[0],
    }
    cases = []
    for count in options.sources:
        rows = measure(count, options.tokens, options.width, getattr(torch, options.dtype), options.repeats)
        print(f"\nS={count} N={options.tokens} D={options.width} {options.dtype}, {run}\n")
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"), flush=True)
        shape = {"S": count, "N": options.tokens, "D": options.width, "dtype": options.dtype}
        cases.append({**shape, "rows": rows})
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps({**run, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
