"""A whole training step (forward, backward, AdamW): plain residuals, AttnRes by hand, and ours, each compiled.

    python benchmarks/training_step.py                              # 24 layers, width 1024, 4 x 2048 tokens, bf16
    python benchmarks/training_step.py --batch 1 --length 4096 --precision autocast
    python benchmarks/training_step.py --device cpu --smoke         # a tiny one: does it run

All models are in one process and take turns; times are medians of several steps between two events. Peak memory is
that of one model: its weights, optimizer state, activations and gradients, without the other models.
"""

import argparse
import copy
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _gpt import NaiveAttnRes
from _measure import default_output, environment, reason_of, summary, write_json
from tabulate import tabulate
from torch import Tensor, nn

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT

PLAIN = "plain residual"
MODELS = (PLAIN, "naive AttnRes, block", "naive AttnRes, full", "ours, block", "ours, full")
Step = Callable[[], Tensor]
#: A model's report, and its step, None where it fails.
Prepared = tuple[dict[str, Any], Step | None]


def build(name: str, original: nn.Module, ids: Tensor, options: argparse.Namespace) -> nn.Module:
    """A compiled copy of the original in one of the forms of MODELS."""
    model = copy.deepcopy(original)
    variant = "full" if name.endswith("full") else "block"
    if name.startswith("ours"):
        blocks = options.num_blocks if variant == "block" else None
        config = ax.AttnResConfig(variant=variant, num_blocks=blocks)
        with precision(options, ids.device):
            ax.compile(model, (ids[:, :-1],), config=config, inner=options.inner, dynamic=False)
        dtype = next(original.parameters()).dtype
        model.attnres.to(dtype)
        return model
    if name.startswith("naive"):
        blocks = options.num_blocks if variant == "block" else 2 * options.layers
        model = NaiveAttnRes(model, blocks).to(ids.device, next(original.parameters()).dtype)
    model.compile(backend=options.inner, fullgraph=True, dynamic=False)
    return model


def precision(options: argparse.Namespace, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "autocast")


def step_of(model: nn.Module, ids: Tensor, options: argparse.Namespace) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with precision(options, ids.device):
            logits = model(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def seconds(step: Step, steps: int, device: torch.device) -> float:
    """Seconds a step, over `steps` of them with no wait between."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) / steps
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(steps):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / steps


def prepare(name: str, original: nn.Module, ids: Tensor, options: argparse.Namespace) -> Prepared:
    """Build, compile and warm up one model."""
    report: dict[str, Any] = {"model": name}
    cuda = ids.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    try:
        model = build(name, original, ids, options)
        step = step_of(model, ids, options)
        report["first_loss"] = step().item()
        report["compile_seconds"] = time.perf_counter() - start
        for _ in range(2):
            step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        step()
        if cuda:
            torch.cuda.synchronize()
    except Exception as error:  # one model that fails must not cost the figures of the others
        return {**report, "status": "failed", "reason": reason_of(error)}, None
    report["peak_bytes"] = torch.cuda.max_memory_allocated() - before if cuda else None
    report["parameters"] = sum(p.numel() for p in model.parameters())
    return {**report, "status": "timed"}, step


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="a tiny model, compiled with the eager backend")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--num-blocks", type=int, default=8)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "autocast", "float32"))
    parser.add_argument("--inner", default="inductor", help="compiler behind every model")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="steps in each timed sample")
    parser.add_argument("--only", nargs="+", default=[], help=f"beginnings of names, beside the plain one: {MODELS}")
    parser.add_argument("--output", type=Path, help="JSON file; benchmarks/results/ by default")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; try --device cpu --smoke")
    if options.smoke:
        tiny = {"layers": 1, "width": 32, "heads": 2, "length": 16, "batch": 1, "num_blocks": 2}
        vars(options).update(tiny, inner="eager", repeats=2, steps=1)
    return options


def prepare_all(names: list[str], original: nn.Module, ids: Tensor, options: argparse.Namespace) -> list[Prepared]:
    """Every model, compiled and warmed up one after the other, so that the peak memory of each is its own."""
    torch.compiler.reset()
    prepared = []
    for name in names:
        report, step = prepare(name, original, ids, options)
        prepared.append((report, step))
        gc.collect()
        print(f"{name}: {report['status']} {report.get('reason', '')}", flush=True)
    return prepared


def time_in_turns(prepared: list[Prepared], options: argparse.Namespace, device: torch.device) -> None:
    """Seconds of a step and tokens a second, added to the report of every model that runs."""
    running = [(report, step) for report, step in prepared if step is not None]
    times: dict[str, list[float]] = {report["model"]: [] for report, _ in running}
    for _ in range(options.repeats):
        for report, step in running:
            times[report["model"]].append(seconds(step, options.steps, device))
    for report, _ in running:
        report |= summary(times[report["model"]])
        report["tokens_per_second"] = options.batch * options.length / (report["microseconds"] / 1e6)


def compare_with_plain(reports: list[dict[str, Any]]) -> None:
    """Time and memory as multiples of those of the plain model, which comes first, added to every report."""
    plain = reports[0]
    for report in reports:
        for key, ratio in (("microseconds", "step_ratio"), ("peak_bytes", "memory_ratio")):
            if report.get(key) and plain.get(key):
                report[ratio] = report[key] / plain[key]


def main(arguments: list[str] | None = None) -> Path:
    options = parse(arguments)
    device = torch.device(options.device)
    output: Path = options.output or default_output("training_step", device, options.smoke)
    torch.manual_seed(0)
    sizes = GPTConfig(options.vocabulary, options.layers, options.heads, options.width, options.length)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    original = SmallGPT(sizes).to(device, dtype)
    ids = torch.randint(0, options.vocabulary, (options.batch, options.length + 1), device=device)
    names = [n for n in MODELS if n == PLAIN or not options.only or n.startswith(tuple(options.only))]
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "device", "only")}
    content: dict[str, Any] = {"benchmark": "training_step", **environment(device), "settings": settings}
    prepared = prepare_all(names, original, ids, options)
    time_in_turns(prepared, options, device)
    reports = content["models"] = [report for report, _ in prepared]
    compare_with_plain(reports)
    write_json(output, content)
    print(f"\n{options.layers} layers, width {options.width}, {options.batch} x {options.length} tokens, "
          f"{options.precision}, {content['device_name']}, torch {content['torch']}\n")  # fmt: skip
    print(tabulate([row(report) for report in reports], headers="keys", tablefmt="github", disable_numparse=True))
    print(f"\nwritten to {output}")
    return output


def row(report: dict[str, Any]) -> dict[str, str]:
    def shown(key: str, scale: float, digits: int) -> str:
        return f"{report[key] * scale:.{digits}f}" if report.get(key) is not None else "-"

    return {
        "model": report["model"],
        "step ms": shown("microseconds", 1e-3, 2),
        "ratio": shown("step_ratio", 1, 3),
        "tokens/s": shown("tokens_per_second", 1, 0),
        "peak GiB": shown("peak_bytes", 2**-30, 2),
        "memory ratio": shown("memory_ratio", 1, 3),
        "first loss": shown("first_loss", 1, 4),
        "compile s": shown("compile_seconds", 1, 1),
        "remark": report.get("reason", ""),
    }


if __name__ == "__main__":
    main()
