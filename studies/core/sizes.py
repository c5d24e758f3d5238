"""How large a study is: the model, its batches, its steps, and what is searched."""

from dataclasses import dataclass

from attnres_fx.demo.run import SIZES as DEMOS
from attnres_fx.demo.small_gpt import GPTConfig

DEMO = DEMOS["small"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size, the same for all studies.

    Args:
        model: Sizes of the model.
        batch: Windows of a batch.
        steps: Of a full training run.
        rates: Learning rates to choose from.
        rate: The one that studies without a search take.
        seeds: Of weights and batches.
        every: Steps between points of a curve.
        validation_batches: How many.
        depths: Of the study of shapes.
        widths: Of the study of shapes.
        device: Where it is trained.
    """

    model: GPTConfig
    batch: int
    steps: int
    rates: tuple[float, ...]
    rate: float
    seeds: tuple[int, ...]
    every: int
    validation_batches: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    device: str = "cpu"


SIZES = {
    # For tests: seconds.
    "tiny": Size(
        model=GPTConfig(layers=1, heads=2, width=16, context=16),
        batch=2,
        steps=2,
        rates=(6e-3,),
        rate=6e-3,
        seeds=(0,),
        every=2,
        validation_batches=1,
        depths=(1,),
        widths=(8, 16),
    ),
    # 0.6 million parameters. The demo trains the same.
    "cpu": Size(
        model=DEMO.model,
        batch=DEMO.batch,
        steps=DEMO.steps,
        rates=(3e-3, 6e-3, 12e-3),
        rate=DEMO.lr,
        seeds=(0, 1, 2),
        every=100,
        validation_batches=32,
        depths=(6, 8, 12, 16, 24),
        widths=(32, 40, 48, 56, 64),
    ),
    # 96 million parameters, 0.8 billion bytes. Written for a GPU and never run on one.
    "gpu": Size(
        model=GPTConfig(layers=24, heads=9, width=576, context=1024),
        batch=32,
        steps=24_000,
        rates=(3e-4, 6e-4, 12e-4),
        rate=6e-4,
        seeds=(0, 1, 2),
        every=500,
        validation_batches=32,
        depths=(12, 16, 24, 32, 48),
        widths=(360, 432, 504, 576, 648),
        device="cuda",
    ),
}
