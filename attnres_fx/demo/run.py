"""Does attention over depth pay? A deep small GPT, trained twice from scratch on real text: residual, and block."""

import contextlib
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnres_fx.analysis.depth_weights import DepthWeights, depth_weights
from attnres_fx.config import AttnResConfig, Variant
from attnres_fx.conversion.convert import convert
from attnres_fx.demo.by_depth import by_depth, growth
from attnres_fx.demo.lengths import steps_for_loss
from attnres_fx.demo.side_by_side import Beside, Curves, Plan, residual_beside, train_block
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.demo.text import Text
from attnres_fx.demo.training import validation_loss
from attnres_fx.errors import MissingPackageError
from attnres_fx.shown import table

VARIANTS: tuple[Variant, ...] = ("full", "block", "local")
AGREEMENT = 1e-5

#: Model, batch and steps of a preset. "small" is the CPU size of the studies.
SIZES = {
    "tiny": Plan(model=GPTConfig(layers=2, width=32, context=32), batch=4, steps=20, more_steps=10, lr=6e-3),
    "small": Plan(model=GPTConfig(layers=12, width=64, context=64), batch=8, steps=800, more_steps=400, lr=6e-3),
    "medium": Plan(model=GPTConfig(layers=16, width=128, context=128), batch=16, steps=2000, more_steps=1000, lr=4e-3),
}


def run_demo(*, steps: int | None, more_steps: int | None, size: str, seed: int, output: Path) -> int:
    """Train a deep small GPT twice, residual and block; show the gain, where reads look, and what depth does.

    Args:
        steps: Training steps of both; by default those of the preset.
        more_steps: How many more the residual model gets in a second training from the start, which tells how many it
            needs.
        size: Name of a preset in `SIZES`.
        seed: Seed of weights and batches.
        output: The folder for losses, pictures and models.

    Returns:
        The exit code: 1 where a converted model does not agree with the original, otherwise 0.
    """
    start = time.perf_counter()
    preset = SIZES[size]
    plan = Plan(
        model=preset.model,
        batch=preset.batch,
        steps=preset.steps if steps is None else steps,
        more_steps=preset.more_steps if more_steps is None else more_steps,
        lr=preset.lr,
        seed=seed,
    )
    output.mkdir(parents=True, exist_ok=True)
    curves, text = Curves(), plan.text()
    with residual_beside(plan, curves, output) as beside:
        block = _converted(plan.fresh_model(), text, "block")
        _print_start(plan, text, block)
        train_block(plan, block, text, beside)
        _print_gain(curves, plan)
        residual = _weights_of(plan, beside)
        _show_routing(block.eval(), text, output)
        _show_depth({"residual": residual, "block": block}, text, output)
        agree = _print_agreement(residual, text)
        beside.take(until=plan.steps + plan.more_steps)
    _print_steps(curves, plan)
    block.save(output / "block.pt")
    _write(curves, plan, output)
    seconds = time.perf_counter() - start
    print(f"\nIn {output}, after {seconds:.0f} s: {', '.join(sorted(p.name for p in output.iterdir()))}")
    print(
        "block.pt is read by attnres_fx.load. These are the numbers of one seed at one small size; docs/evidence.md "
        "has more.\nNext: examples/convert_huggingface.py for a Llama; attnres_fx.inspect(your_model, ...)."
    )
    return 0 if agree else 1


def _converted(model: nn.Module, text: Text, variant: Variant) -> Any:
    config = AttnResConfig(variant=variant)  # blocks of an eighth of the sublayers
    return convert(model, (text.validation[0][0],), config=config, dynamic_shapes={}, check="outputs")


def _print_start(plan: Plan, text: Text, block: Any) -> None:
    count = sum(p.numel() for p in plan.fresh_model().parameters())
    print(
        f"A GPT of {plan.model.layers} layers and {count:,} parameters, on {len(text.train):,} bytes of Python's own "
        f"library.\nTrained from scratch twice for {plan.steps} steps, same weights, same batches: as it is (residual) "
        f"and converted while fresh:\n\n{block.report}\n\nValidation loss in nats a byte:",
        flush=True,
    )


def _print_gain(curves: Curves, plan: Plan) -> None:
    residual, block = curves.residual[plan.steps][plan.steps].validation, curves.block[plan.steps].validation
    place = "below" if block < residual else "above"
    print(f"\nAfter {plan.steps} steps block is {abs(residual - block):.4f} nats a byte {place} residual.", flush=True)


def _weights_of(plan: Plan, beside: Beside) -> SmallGPT:
    model = plan.fresh_model()
    model.load_state_dict(torch.load(beside.weights[plan.steps], weights_only=True))
    return model.eval()


def _show_routing(block: nn.Module, text: Text, output: Path) -> None:
    weights = depth_weights(block, (text.validation[0][0],))
    print(f"\nWhat each read of the block model attends to (mean over tokens):\n\n{weights}")
    print(f"\n{_steepest(weights)}", flush=True)
    with contextlib.suppress(MissingPackageError):
        weights.plot(output / "depth_weights.png")


def _steepest(weights: DepthWeights) -> str:
    read = max(weights, key=lambda r: max(r.mean()) / min(r.mean()))
    means = read.mean()
    most, least = means.index(max(means)), means.index(min(means))
    return (
        f"The least even read is {read.name}: {read.sources[most]} weighs {means[most] / means[least]:.1f} times "
        f"{read.sources[least]}."
    )


def _show_depth(models: dict[str, nn.Module], text: Text, output: Path) -> None:
    """Magnitudes and gradients by depth, a row a sublayer."""
    found = {name: by_depth(model, text) for name, model in models.items()}
    columns = {
        "writes": {name: d.writes for name, d in found.items()},
        "state": {name: d.states for name, d in found.items()},
        "gradient": {name: [1000 * g for g in d.gradients] for name, d in found.items()},
    }
    rows = [
        {"sublayer": sublayer.name.removesuffix(".project")}
        | {f"{name} {what}": f"{v[i]:.2f}" for what, values in columns.items() for name, v in values.items()}
        for i, sublayer in enumerate(found["residual"].profile.streams[0].sublayers)
    ]
    print(
        "\nBy depth: root mean square of what a sublayer writes and of the state that the next read gets (of block the "
        "mean\nof its sources), and the norm of the loss's gradient at what it writes, times 1000:\n"
    )
    print(table(rows, right=tuple(rows[0])[1:]))
    for what, values in columns.items():
        ratios = (f"{growth(v):.2f} ({name})" for name, v in values.items())
        print(f"{what}, mean of the last quarter over that of the first: {', '.join(ratios)}", flush=True)
    for name, depth in found.items():
        with contextlib.suppress(MissingPackageError):
            depth.profile.plot(output / f"depth_{name}.png")


def _print_agreement(residual: nn.Module, text: Text) -> bool:
    original = validation_loss(residual, text)
    losses: dict[str, float] = {}
    for variant in VARIANTS:
        losses[variant] = validation_loss(_converted(copy.deepcopy(residual), text, variant), text)
    rows = [
        {"model": name, "loss": f"{loss:.7f}", "relative difference": f"{abs(loss - original) / original:.1e}"}
        for name, loss in ({"trained residual model": original} | losses).items()
    ]
    print("\nThe trained residual model, converted: its validation loss before a single further step.\n")
    print(table(rows, right=("loss", "relative difference")))
    agree = all(abs(x - original) <= AGREEMENT * original for x in losses.values())
    print(f"\nThey {'agree' if agree else 'DO NOT AGREE'} to {AGREEMENT:.0e} relative.", flush=True)
    return agree


def _print_steps(curves: Curves, plan: Plan) -> None:
    wanted = curves.block[plan.steps].validation
    losses = {steps: curve[steps].validation for steps, curve in curves.residual.items()}
    longer = plan.steps + plan.more_steps
    print(f"\nResidual, trained again from the start for {longer} steps: {losses[longer]:.4f}.")
    if len(losses) < 2 or wanted >= losses[plan.steps]:
        print(f"It needs no more steps than block for block's {wanted:.4f}.")
        return
    needed = steps_for_loss(losses, wanted)
    word = "needs" if needed <= longer else "would need, if it goes on falling like that,"
    print(f"For block's {wanted:.4f} it {word} {needed:.0f} steps: {needed / plan.steps:.2f} times as many.")


def _write(curves: Curves, plan: Plan, output: Path) -> None:
    named = {f"residual, {steps} steps": curve for steps, curve in curves.residual.items()}
    named[f"block, {plan.steps} steps"] = curves.block
    lists = {name: [asdict(p) for p in curve.values()] for name, curve in named.items()}
    (output / "losses.json").write_text(json.dumps({"plan": asdict(plan), "curves": lists}, indent=1) + "\n")
