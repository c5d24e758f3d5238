"""Reads of the block variant: one fused kernel a read against two phases, beside the paper's table.

    python benchmarks/two_phase.py                            # 128 sublayers, 8 blocks, 8192 tokens, width 4096
    python benchmarks/two_phase.py --device cpu --smoke       # tiny: does it run

Bytes are counted a token and sublayer in units of d (one vector of the model's width), the sublayer itself left out,
as in arXiv 2603.15031, table 1, whose figure for two phases is (N/S + 5) d; N blocks of S sublayers. There N/S counts
every block's completed sources as N; here each block's own are counted. Times are of all reads of one model, forward
and with backward, with random sublayer outputs.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import Clock, copy_of, default_output, environment, reason_of, relative_error, summary, write_json
from tabulate import tabulate
from torch import Tensor

try:
    from attnres_fx.ops.fused import depth_attention_fused
    from attnres_fx.ops.phases import depth_attention_batch, depth_attention_merge

    MISSING = None
except ImportError as error:
    MISSING = f"this attnres_fx has no fused and two-phase operators ({error}): bytes only"

EPS = 1e-6


@dataclass(frozen=True)
class Bytes:
    """Vectors of width d read and written by all reads of a model, for one token."""

    read: float
    written: float

    def per_sublayer(self, sublayers: int) -> float:
        return (self.read + self.written) / sublayers


def blocks_of(sublayers: int, blocks: int) -> list[int]:
    """Sublayers of each block, as even as can be, the longer first."""
    small, longer = divmod(sublayers, blocks)
    return [small + (i < longer) for i in range(blocks)]


def count_fused(sizes: list[int]) -> Bytes:
    """One kernel a read. The i-th read of a block with n completed sources: n, the partial sum and (from the third
    on) the term added to it are read; the read and (from the third on) the new partial sum are written."""
    read = written = 0.0
    for completed, size in enumerate(sizes, start=1):
        for i in range(size):
            read += completed + min(i, 2)
            written += 1 + (i >= 2)
    return Bytes(read, written)


def count_two_phase(sizes: list[int]) -> Bytes:
    """Completed sources twice a block (logits, mixtures), one output a read; then a merge reads that, the partial sum
    and the term."""
    read = written = 0.0
    for completed, size in enumerate(sizes, start=1):
        read += 2 * completed
        written += size
        for i in range(1, size):
            read += 1 + min(i, 2)
            written += 1 + (i >= 2)
    return Bytes(read, written)


class Model:
    """All reads of a block-variant model whose sublayers wrote what they wrote."""

    def __init__(self, sizes: list[int], tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator).requires_grad_()

        self.sizes = sizes
        self.completed = [normal(tokens, width) for _ in sizes]
        self.terms = [[normal(tokens, width) for _ in range(size)] for size in sizes]
        self.queries = [[normal(width) for _ in range(size)] for size in sizes]
        self.gains = [[torch.ones(width, device=device, requires_grad=True) for _ in range(size)] for size in sizes]
        with torch.no_grad():
            for row in self.queries:
                for query in row:
                    query.mul_(width**-0.5)
        self.grad = normal(tokens, width).detach()
        self.leaves = [*self.completed, *(t for row in (*self.terms, *self.queries) for t in row[:-1])]

    def fused(self) -> list[Tensor]:
        """Every read through the fused operator."""
        reads: list[Tensor] = []
        for block, size in enumerate(self.sizes):
            sources = self.completed[: block + 1]
            partial: Tensor | None = None
            for i in range(size):
                query, gain = self.queries[block][i], self.gains[block][i]
                given = [*sources, partial] if partial is not None else sources
                delta = self.terms[block][i - 1] if i >= 2 else None
                out = depth_attention_fused(given, query, gain, eps=EPS, delta=delta)
                reads.append(out[0])
                partial = self.terms[block][0] if i == 0 else out[-1] if i >= 2 else partial
        return reads

    def two_phase(self) -> list[Tensor]:
        """The same reads through a batched read a block and a merge a read."""
        reads: list[Tensor] = []
        for block, size in enumerate(self.sizes):
            queries, gains = self.queries[block], self.gains[block]
            outputs = depth_attention_batch(self.completed[: block + 1], queries, gains, eps=EPS)
            reads.append(outputs[0])
            partial = self.terms[block][0]
            for i in range(1, size):
                delta = self.terms[block][i - 1] if i >= 2 else None
                merged = depth_attention_merge(
                    outputs[i], outputs[size + i], partial, queries[i], gains[i], eps=EPS, delta=delta
                )
                reads.append(merged[0])
                partial = merged[-1] if i >= 2 else partial
        return reads

    def gradients(self, run: Callable[[], list[Tensor]]) -> tuple[Tensor | None, ...]:
        reads = run()
        return torch.autograd.grad(reads, self.leaves, [self.grad] * len(reads), allow_unused=True)


def difference(model: Model) -> dict[str, float]:
    """Largest relative difference between the two forms."""
    with torch.no_grad():
        reads = [relative_error(a, b.double()) for a, b in zip(model.two_phase(), model.fused(), strict=True)]
    pairs = zip(model.gradients(model.two_phase), model.gradients(model.fused), strict=True)
    grads = [relative_error(a, b.double()) for a, b in pairs if a is not None and b is not None]
    return {"reads": max(reads), "gradients": max(grads)}


def timed(model: Model, clock: Clock, copy: Any, repeats: int) -> dict[str, dict[str, float]]:
    def inference(run: Callable[[], list[Tensor]]) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                run()

        return forward

    runs: dict[str, Callable[[], object]] = {"copy": copy}
    for name, run in (("fused", model.fused), ("two_phase", model.two_phase)):
        runs[f"{name} forward"] = inference(run)
        runs[f"{name} both"] = lambda run=run: model.gradients(run)
    for run in runs.values():
        for _ in range(2):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(clock.seconds(run))
    return {name: summary(taken) for name, taken in times.items()}


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, float32")
    parser.add_argument("--sublayers", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file; benchmarks/results/ by default")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; try --device cpu --smoke")
    if options.smoke:
        options.sublayers, options.blocks, options.tokens, options.width, options.repeats = 9, 2, 5, 32, 2
    device = torch.device(options.device)
    dtype = torch.float32 if options.smoke else torch.bfloat16
    output = options.output or default_output("two_phase", device, options.smoke)
    sizes = blocks_of(options.sublayers, options.blocks)
    count = options.sublayers
    paper = options.blocks / (count / options.blocks) + 5
    counted = {"fused": count_fused(sizes), "two_phase": count_two_phase(sizes)}
    content: dict[str, Any] = {"benchmark": "two_phase", **environment(device), "dtype": str(dtype).split(".")[-1]}
    content |= {k: getattr(options, k) for k in ("sublayers", "blocks", "tokens", "width", "repeats")}
    content["paper_d"] = paper
    content["counted_d"] = {name: found.per_sublayer(count) for name, found in counted.items()}
    reason = MISSING
    copied = (1 << 22) if options.smoke else (1 << 30)
    if reason is None:
        try:
            model = Model(sizes, options.tokens, options.width, dtype, device)
            content["difference"] = difference(model)
            clock = Clock(device)
            content["times"] = timed(model, clock, copy_of(device, copied), options.repeats)
        except Exception as error:  # the bytes are worth printing without the times
            reason = reason_of(error)
    content["reason"] = reason
    write_json(output, content)
    times = content.get("times")
    rows = []
    for name, found in counted.items():
        row: dict[str, Any] = {"form": name.replace("_", "-"), "d a token and sublayer": found.per_sublayer(count)}
        row |= {"read": found.read / count, "written": found.written / count}
        if times:
            moved = (found.read + found.written) * options.tokens * options.width * dtype.itemsize
            forward = times[f"{name} forward"]["microseconds"]
            row |= {"forward ms": forward / 1e3, "forward and backward ms": times[f"{name} both"]["microseconds"] / 1e3}
            row |= {"forward of copy": moved / forward / (2 * copied / times["copy"]["microseconds"])}
        rows.append(row)
    rows.append({"form": "paper, two-phase: (N/S + 5) d", "d a token and sublayer": paper})
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    print(f"\n{reason or 'largest relative differences: ' + str(content['difference'])}\nwritten to {output}")
    return output


if __name__ == "__main__":
    main()
