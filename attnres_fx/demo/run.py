"""The main job on real text: train a small GPT, convert it three ways, train on, look at the weights."""

import contextlib
import copy
import json
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from attnres_fx.analysis.depth_weights import DepthWeights, depth_weights
from attnres_fx.config import AttnResConfig, Variant
from attnres_fx.conversion.convert import convert
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.errors import MissingPackageError
from attnres_fx.parameters import parameter_groups

VARIANTS: tuple[Variant, ...] = ("full", "block", "local")
AGREEMENT = 1e-5


@dataclass(frozen=True)
class Size:
    """Sizes of one preset: the GPT's, the batch, and the steps before and after the conversion."""

    width: int
    layers: int
    context: int
    batch: int
    steps: int
    more_steps: int


SIZES = {
    "tiny": Size(width=32, layers=2, context=32, batch=4, steps=20, more_steps=5),
    "small": Size(width=96, layers=4, context=64, batch=8, steps=1000, more_steps=150),
    "medium": Size(width=256, layers=8, context=256, batch=16, steps=1500, more_steps=300),
}


def run_demo(*, steps: int | None, more_steps: int | None, size: str, seed: int, output: Path) -> int:
    """Train a small GPT, convert it to every variant, train each further, and draw what the reads attend to.

    Args:
        steps: Training steps before the conversion; by default those of the preset.
        more_steps: Training steps after it, for each model.
        size: Name of a preset in `SIZES`.
        seed: Seed of weights and batches.
        output: The folder for losses, picture and saved model.

    Returns:
        The exit code: 1 where a converted model does not agree with the original, otherwise 0.
    """
    preset = SIZES[size]
    steps = preset.steps if steps is None else steps
    more_steps = preset.more_steps if more_steps is None else more_steps
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    text = Text.from_standard_library(preset)
    config = GPTConfig(layers=preset.layers, width=preset.width, context=preset.context)
    model = SmallGPT(config)
    print(f"A GPT of {sum(p.numel() for p in model.parameters()):,} parameters on {len(text.train):,} bytes of Python.")
    _train(model, text, steps, seed, "original")

    models: dict[str, nn.Module] = {"original": model}
    for variant in VARIANTS:
        wanted = AttnResConfig(variant=variant, num_blocks=None if variant == "full" else preset.layers)
        converted = convert(copy.deepcopy(model), (text.validation[0][0],), config=wanted)
        models[variant] = converted
        print(f"\n{converted.report}")
    before = {name: _loss(m, text) for name, m in models.items()}
    if not _print_agreement(before):
        return 1

    print(f"\nTraining each of them {more_steps} steps further on the same batches:")
    for name, each in models.items():
        _train(each, text, more_steps, seed + 1, name)
    after = {name: _loss(m, text) for name, m in models.items()}
    _print_losses(before, after, output)
    block: Any = models["block"]
    weights = depth_weights(block, (text.validation[0][0],))
    print(f"\nWhat each read of the block variant attends to (mean over tokens):\n\n{weights}")
    _draw(weights, output / "depth_weights.png")
    block.save(output / "block.pt")
    print(f"\nIn {output}: losses.json, block.pt (attnres_fx.load reads it)" + _picture_note(output))
    print(
        "\nSo few steps say nothing about quality: the gains the paper reports come from training from scratch "
        "or for long.\nNext: attnres-fx demo --size medium; examples/convert_huggingface.py for a Llama; "
        "attnres_fx.inspect(your_model, ...)."
    )
    return 0


@dataclass
class Text:
    """Bytes to train on [length], fixed validation batches, and the sizes to draw batches with."""

    train: Tensor
    validation: list[tuple[Tensor, Tensor]]
    preset: Size

    @staticmethod
    def from_standard_library(preset: Size) -> "Text":
        """The sources of Python's own standard library; every tenth file is kept for validation."""
        folder = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
        files = [p for p in sorted(folder.rglob("*.py")) if not skipped & set(p.relative_to(folder).parts)]
        train = b"".join(p.read_bytes() for i, p in enumerate(files) if i % 10)[: 8 << 20]
        held = b"".join(p.read_bytes() for i, p in enumerate(files) if i % 10 == 0)[: 1 << 20]
        validation_text = torch.frombuffer(bytearray(held), dtype=torch.uint8).long()
        generator = torch.Generator().manual_seed(0)
        text = Text(torch.frombuffer(bytearray(train), dtype=torch.uint8).long(), [], preset)
        text.validation = [text.batch(generator, validation_text) for _ in range(8)]
        return text

    def batch(self, generator: torch.Generator, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Random windows and the same one byte later, [batch, context] each."""
        source = self.train if source is None else source
        length = self.preset.context
        starts = torch.randint(0, len(source) - length - 1, (self.preset.batch,), generator=generator)
        windows = torch.stack([source[s : s + length + 1] for s in starts.tolist()])
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _loss(model: nn.Module, text: Text) -> float:
    """Mean validation loss in nats a byte, in eval mode."""
    model.eval()
    with torch.no_grad():
        losses = [_cross_entropy(model(ids), targets).double() for ids, targets in text.validation]
    return float(torch.stack(losses).mean())


def _train(model: nn.Module, text: Text, steps: int, seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups: Any = parameter_groups(model) if hasattr(model, "attnres") else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    model.train()
    show, start = _progress(), time.perf_counter()
    for step in range(1, steps + 1):
        ids, targets = text.batch(generator)
        loss = _cross_entropy(model(ids), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps:
            seconds = time.perf_counter() - start
            show(f"  {name}: step {step}/{steps}, loss {loss.item():.3f}, {seconds:.0f} s", step == steps)


def _progress() -> Callable[[str, bool], None]:
    """One line written over and over on a terminal; the last one only elsewhere."""
    terminal = sys.stdout.isatty()

    def show(line: str, last: bool) -> None:
        if terminal:
            print(f"\r{line:<70}", end="\n" if last else "", flush=True)
        elif last:
            print(line, flush=True)

    return show


def _print_agreement(losses: dict[str, float]) -> bool:
    original = losses["original"]
    rows = [(name, f"{x:.7f}", f"{abs(x - original) / original:.1e}") for name, x in losses.items()]
    print("\nValidation loss right after the conversion:\n")
    print(tabulate(rows, headers=["model", "loss", "relative difference"], disable_numparse=True))
    agree = all(abs(x - original) <= AGREEMENT * original for x in losses.values())
    print(f"\nThey {'agree' if agree else 'DO NOT AGREE'} to {AGREEMENT:.0e} relative.")
    return agree


def _print_losses(before: dict[str, float], after: dict[str, float], output: Path) -> None:
    rows = [
        {"model": n, "before": before[n], "after": after[n], "against original": after[n] - after["original"]}
        for n in before
    ]
    print(f"\nValidation losses:\n\n{tabulate(rows, headers='keys', floatfmt='.4f')}")
    (output / "losses.json").write_text(json.dumps(rows, indent=1))


def _picture_note(output: Path) -> str:
    return ", depth_weights.png" if (output / "depth_weights.png").is_file() else "; no picture without matplotlib"


def _draw(weights: DepthWeights, path: Path) -> None:
    """The heat map as a PNG, where matplotlib is installed."""
    with contextlib.suppress(MissingPackageError):
        weights.plot(path)
