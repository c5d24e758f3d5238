"""Time of analysis and rewrite against the number of sublayers: `python benchmarks/pass_time.py`."""

import argparse
import math
import statistics
import time

import torch
from tabulate import tabulate
from torch import nn

import attnres_fx as ax
from attnres_fx.conversion.rewriting import rewrite_
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import analyze_, plan_depth_reads, propagate_values_
from attnres_fx.stream_reads import DepthRead


class Stack(nn.Module):
    """A pre-norm residual stack of so many sublayers."""

    def __init__(self, sublayers: int, width: int = 16) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(sublayers + 1))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(sublayers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x)).relu()
        return self.norms[-1](x)


def seconds(sublayers: int, variant: str) -> float:
    """Seconds for analysis, plan and rewrite of one fresh trace."""
    gm = torch.fx.symbolic_trace(Stack(sublayers))
    propagate_values_(gm, [torch.randn(2, 4, 16)])
    config = ax.AttnResConfig(variant=variant)
    start = time.perf_counter()
    found = analyze_(gm)
    plan = plan_depth_reads(found, found.streams, config)
    parameters = AttnResParameters([DepthRead(r.read, r.width) for r in plan.reads], config)
    rewrite_(gm, found, plan, parameters)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sublayers", type=int, nargs="+", default=[24, 48, 96, 200, 384])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds(8, "full")
    rows = []
    for variant in ("full", "block", "local"):
        times = [statistics.median(seconds(n, variant) for _ in range(options.repeats)) for n in options.sublayers]
        first, last = options.sublayers[0], options.sublayers[-1]
        exponent = math.log(times[-1] / times[0]) / math.log(last / first) if last > first else float("nan")
        rows.append([variant, *(f"{t:.3f}" for t in times), f"{exponent:.2f}"])
    print(f"torch {torch.__version__}, one thread, seconds (median of {options.repeats})\n")
    print(tabulate(rows, headers=["variant", *options.sublayers, "growth exponent"], disable_numparse=True))


if __name__ == "__main__":
    main()
