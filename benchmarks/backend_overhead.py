"""What the attnres backend costs beside Inductor alone: compile time, forward, training step.

    python benchmarks/backend_overhead.py                 # the example GPT, 12 layers, width 512, 512 tokens
    python benchmarks/backend_overhead.py --layers 4 --width 128 --repeats 3

Side by side in one process: (a) Inductor on the original, (b) this backend in each variant, (c) a naive AttnRes
model written by hand (stack, norm, einsum) under Inductor. Runs are interleaved; medians and ratios to (a).
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
import torch._inductor.config
from _gpt import NaiveAttnRes
from tabulate import tabulate
from torch import Tensor, nn

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT

ORIGINAL = "original, Inductor"
#: What is timed of a model, by name.
Runs = dict[str, Callable[[], None]]


def step_of(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_of(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            model(ids[:, :-1])

    return forward


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def build_models(options: argparse.Namespace) -> tuple[dict[str, nn.Module], Tensor]:
    """The original and its AttnRes forms, by name, not compiled yet; and tokens to run them on."""
    config = GPTConfig(layers=options.layers, heads=8, width=options.width, context=options.length)
    original = SmallGPT(config)
    ids = torch.randint(0, 256, (options.batch, options.length + 1))
    models: dict[str, nn.Module] = {ORIGINAL: copy.deepcopy(original)}
    for variant in ("full", "block", "local"):
        blocks = None if variant == "full" else options.num_blocks
        model = copy.deepcopy(original)
        ax.attach(model, (ids[:, :-1],), config=ax.AttnResConfig(variant=variant, num_blocks=blocks))
        models[f"attnres, {variant}"] = model
    models["naive AttnRes, Inductor"] = NaiveAttnRes(copy.deepcopy(original), options.num_blocks)
    return {n: m for n, m in models.items() if n == ORIGINAL or not options.only or n in options.only}, ids


def compile_model(name: str, model: nn.Module, ids: Tensor) -> tuple[Runs, float]:
    """What is timed of a model, and the seconds that the first calls took; warms it up."""
    model.compile(backend="attnres" if name.startswith("attnres") else "inductor", fullgraph=True, dynamic=False)
    runs = {"step": step_of(model, ids), "forward": forward_of(model, ids)}
    compile_seconds = seconds(runs["step"]) + seconds(runs["forward"])
    print(f"compiled {name}: {compile_seconds:.1f} s", flush=True)
    for run in runs.values():
        run()
    return runs, compile_seconds


def median_seconds(runs: dict[str, Runs], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds by model and kind of run; the models take turns."""
    times: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in of_model} for name, of_model in runs.items()
    }
    for _ in range(repeats):
        for name, of_model in runs.items():
            for kind, run in of_model.items():
                times[name][kind].append(seconds(run))
    return {name: {kind: statistics.median(t) for kind, t in kinds.items()} for name, kinds in times.items()}


def as_rows(compile_seconds: dict[str, float], medians: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """One row a model, each figure beside its ratio to the original's."""
    base = medians[ORIGINAL]
    return [
        {
            "model": name,
            "compile s": compile_seconds[name],
            "x": compile_seconds[name] / compile_seconds[ORIGINAL],
            "forward ms": 1e3 * m["forward"],
            "x ": m["forward"] / base["forward"],
            "step ms": 1e3 * m["step"],
            "x  ": m["step"] / base["step"],
        }
        for name, m in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--num-blocks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="names to run beside the original")
    options = parser.parse_args()
    torch.manual_seed(0)
    models, ids = build_models(options)

    torch._inductor.config.force_disable_caches = True
    compiled = {name: compile_model(name, model, ids) for name, model in models.items()}
    medians = median_seconds({name: runs for name, (runs, _) in compiled.items()}, options.repeats)
    rows = as_rows({name: spent for name, (_, spent) in compiled.items()}, medians)
    print(
        f"\n{options.layers} layers, width {options.width}, {options.batch} x {options.length} tokens, "
        f"{options.num_blocks} blocks, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, {date.today()}, median of {options.repeats}\n"
    )
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
