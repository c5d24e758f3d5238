"""Compile every kernel ahead of time for GPUs that need not be here, and report what the code needs.

    python benchmarks/compile_kernels.py --targets sm_80 sm_90 sm_100 --output benchmarks/results/kernels_compiled.json

Registers, stack and spills (bytes a thread), shared memory (bytes a program), the width in bytes of loads and
stores of device memory (the smallest and the commonest), and the seconds a compilation took. Pointers and strides
carry the alignment a real launch has.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnres_fx.ops.kernels import batch, batch_launch, read
from attnres_fx.ops.kernels.layout import MOST_SOURCES, layout_of
from attnres_fx.ops.kernels.tuning import DEFAULT

ALIGNED = [["tt.divisibility", 16]]
DTYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


@dataclass(frozen=True)
class Case:
    """A kernel as one launch compiles it."""

    direction: str
    sources: int
    width: int
    dtype: str = "bf16"
    norm: int = 0
    delta: bool = False
    carry: bool = False
    other_grads: bool = False
    bias: bool = False
    value_norm: bool = False

    def __str__(self) -> str:
        extras = [n for n in ("delta", "carry", "other_grads", "bias", "value_norm") if getattr(self, n)]
        norm = ["", "rms", "layer"][self.norm]
        return " ".join(filter(None, [self.direction, f"S={self.sources} D={self.width}", self.dtype, norm, *extras]))


@dataclass
class Compiled:
    case: str
    target: str
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    load_bytes: str
    store_bytes: str
    seconds: float


def arguments(case: Case) -> dict[str, str | int | None]:
    """Type of each argument: a pointer or number as text, a constant as itself."""
    if case.direction.startswith("batch"):
        return batch_arguments(case)
    rows, most = DTYPES[case.dtype], MOST_SOURCES
    layout = layout_of(case.width, case.direction, 4 if case.dtype == "fp32" else 2)

    def many(prefix: str, kind: str, present: bool = True) -> dict[str, str | None]:
        return {f"{prefix}{i}": kind if present and i < case.sources else None for i in range(most)}

    def maybe(kind: str, present: bool) -> str | None:
        return kind if present else None

    strides = {f"t{i}": "i32" if i < case.sources else 0 for i in range(most)}
    ends = {
        "S": case.sources,
        "D": case.width,
        "K": layout.chunks,
        "C": layout.chunk,
        "NORM": case.norm,
        "PACKED": True,
        "VALUE_NORM": case.value_norm,
    }
    weights = {"query": "*fp32", "key_weight": "*fp32", "bias": maybe("*fp32", case.bias)}
    weights |= {"norm_weight": maybe("*fp32", case.norm > 0)}
    given: dict[str, str | int | None] = {**many("s", rows), **strides}
    if case.direction == "forward":
        given |= {"delta": maybe(rows, case.delta), "delta_stride": "i32" if case.delta else 0}
        given |= {"carry": maybe(rows, case.carry), "carry_lse": maybe("*fp32", case.carry)}
        given |= {
            **weights,
            "norm_bias": maybe("*fp32", case.norm == 2),
            "out": rows,
            "partial": maybe(rows, case.delta),
        }
        given |= {"lse": "*fp32", "stats": "*fp32", "norm_stats": maybe("*fp32", case.norm > 0)}
        return given | {"N": "i32", "eps": "fp32", "gain": "fp32", "norm_eps": "fp32"} | ends
    given |= {**many("g", rows), **many("a", rows, case.other_grads)}
    given |= {"carry": maybe(rows, case.carry), "carry_lse": maybe("*fp32", case.carry)}
    given |= {**weights, "grad_out": rows, "grad_out_stride": "i32", "grad_lse": None, "lse": "*fp32", "stats": "*fp32"}
    given |= {"norm_stats": maybe("*fp32", case.norm > 0), "grad_carry": maybe(rows, case.carry)}
    given |= {"grad_carry_lse": maybe("*fp32", case.carry)}
    given |= {"grad_logits": maybe("*fp32", case.bias), "weight_rows": "*fp32"}
    given |= {"norm_weight_rows": maybe("*fp32", case.norm > 0), "norm_bias_rows": maybe("*fp32", case.norm == 2)}
    return given | {"N": "i32", "gain": "fp32"} | ends


def batch_arguments(case: Case) -> dict[str, str | int | None]:
    """The same for a kernel of phase 1; Q queries are as many as sources."""
    rows, count = DTYPES[case.dtype], case.sources
    kernel = getattr(batch, case.direction)
    given: dict[str, str | int | None] = {}
    fixed = {"S": count, "Q": count, "QP": 16, "P": 16, "D": case.width, **tiles_of(case)}
    absent = {"bias": not case.bias, "scales": not case.value_norm and case.direction == "batch_mix"}
    for name in kernel.arg_names:
        if absent.get(name):
            given[name] = None
        elif name in fixed:
            given[name] = fixed[name]
        elif re.fullmatch(r"[sgd]\d+", name):
            given[name] = rows if int(name[1:]) < count else None
        elif re.fullmatch(r"t\d+", name):
            given[name] = "i32" if int(name[1:]) < count else 0
        else:
            given[name] = {"N": "i32", "eps": "fp32", "mixed": rows}.get(name, "*fp32")
    return given


def tiles_of(case: Case) -> dict[str, int]:
    kind = case.direction.removeprefix("batch_")
    tiles = {"logits": batch_launch._LOGITS, "scores": batch_launch._SCORES, "weights": batch_launch._WEIGHTS}
    return tiles.get(kind, batch_launch._MIX)


def compile_case(case: Case, target: str) -> Compiled:
    """Compile one kernel for a target such as `sm_90`; needs Triton, no GPU."""
    kernels = {"forward": read.read_forward, "backward": read.read_backward}
    kernel = kernels.get(case.direction) or getattr(batch, case.direction)
    given = arguments(case)
    constant = {n: v for n, v in given.items() if not isinstance(v, str)}
    signature = {n: v if isinstance(v, str) else "constexpr" for n, v in given.items()}
    names = list(given)
    aligned = [
        n for n, v in given.items() if isinstance(v, str) and (v.startswith("*") or n.startswith("t") or "stride" in n)
    ]
    attributes = {(names.index(n),): ALIGNED for n in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constant, attrs=attributes)
    warps = tiles_of(case)["num_warps"]
    if case.direction in kernels:
        warps = layout_of(case.width, case.direction, 4 if case.dtype == "fp32" else 2).warps  # type: ignore[arg-type]
    began = time.perf_counter()
    options = {"num_warps": warps, "num_stages": DEFAULT.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)
    seconds = time.perf_counter() - began
    registers, stack, shared = _resources(compiled.asm["cubin"])
    spills = _spills(compiled.asm["ptx"], target)
    loads, stores = (_widths(compiled.asm["ptx"], kind) for kind in ("ld", "st"))
    return Compiled(str(case), target, warps, registers, stack, spills, shared, loads, stores, round(seconds, 1))


def _tool(name: str) -> str:
    where = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return str(next(p for p in (where / name, where / f"{name}-blackwell") if p.exists()))


def _resources(cubin: bytes) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, shared = (int(re.search(rf"{n}:(\d+)", told.stdout)[1]) for n in ("REG", "STACK", "SHARED"))  # type: ignore[index]
    return registers, stack, shared


def _spills(ptx: str, target: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        arch = re.search(r"\.target (sm_\w+)", ptx)
        run = [_tool("ptxas"), "-v", f"-arch={arch[1] if arch else target}", "kernel.ptx", "-o", "kernel.cubin"]
        told = subprocess.run(run, capture_output=True, text=True, cwd=folder)
    return sum(map(int, re.findall(r"(\d+) bytes spill", told.stderr)))


def _widths(ptx: str, kind: str) -> str:
    """Bytes a thread moves with one instruction: `16 x 40, 4 x 12`, widest first."""
    counts: Counter[int] = Counter()
    for vector, bits in re.findall(rf"{kind}\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx):
        counts[int(vector or 1) * int(bits) // 8] += 1
    return ", ".join(f"{width} x {count}" for width, count in sorted(counts.items(), reverse=True))


def all_cases() -> list[Case]:
    widths = [(s, d) for s in (2, 5, 9, 16) for d in (2048, 4096, 7168)]
    plain = [Case("forward", *w) for w in widths] + [Case("backward", *w) for w in widths]
    fused = [
        Case("forward", 9, 7168, norm=1, delta=True),
        Case("backward", 9, 7168, norm=1, delta=True, other_grads=True),
        Case("forward", 9, 4096, norm=2),
        Case("backward", 9, 4096, norm=2, other_grads=True),
        Case("forward", 1, 7168, carry=True),
        Case("backward", 1, 7168, carry=True),
        Case("forward", 9, 7168, "fp32"),
        Case("backward", 9, 7168, "fp32"),
        Case("forward", 9, 7168, bias=True, value_norm=True),
        Case("backward", 9, 7168, bias=True, value_norm=True),
    ]
    phases = [Case(f"batch_{k}", n, 4096) for k in ("logits", "mix", "scores", "spread", "weights") for n in (4, 9)]
    phases += [Case(f"batch_{k}", 9, 4096, bias=True, value_norm=True) for k in ("logits", "mix")]
    return [*plain, *fused, *phases]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--only", default="", help="part of a case's text")
    parser.add_argument("--exactly", nargs="+", help="whole texts of cases, in this order")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(given)
    named = {str(c): c for c in all_cases() if options.only in str(c)}
    done = []
    for text in options.exactly or named:
        for target in options.targets:
            done.append(compile_case(named[text], target))
            print(done[-1], file=sys.stderr, flush=True)
    print(tabulate([asdict(c) for c in done], headers="keys", tablefmt="github"))
    if options.output:
        about: dict[str, Any] = {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        about |= {"date": date.today().isoformat(), "compiled": [asdict(c) for c in done]}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
