"""Depth weights of a model in training, written to a CSV file or to TensorBoard."""

import csv
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from attnres_fx.analysis.depth_weights import DepthWeights
from attnres_fx.analysis.weight_grid import WeightGrid, grids
from attnres_fx.errors import ArgumentError

_COLUMNS = ("step", "stream", "read", "source", "back", "weight")


@runtime_checkable
class ScalarWriter(Protocol):
    """What of TensorBoard's `SummaryWriter` is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """Write a number."""

    def add_image(self, tag: str, img_tensor: Tensor, global_step: int | None = None) -> Any:
        """Write a picture, [3, height, width] between 0 and 1."""


def log_depth_weights(weights: DepthWeights, step: int, to: str | Path | ScalarWriter) -> None:
    """Write depth weights of one step; for a training loop of one's own.

    Args:
        weights: What `depth_weights` returned.
        step: Of the training.
        to: Path of a CSV file, which gets a line for each weight (`step,stream,read,source,back,weight`) below those
            it has; or a TensorBoard writer (`add_scalar`, `add_image`), which gets entropy, reach and the weight of
            the newest source of each read, and a heat map a stream.

    Raises:
        ArgumentError: `to` is neither, or a file of other columns, or it cannot be written.
    """
    if isinstance(to, str | Path):
        _append(weights, step, Path(to))
    elif isinstance(to, ScalarWriter):
        _write_summary(weights, step, to)
    else:
        raise ArgumentError(
            f"depth weights are logged to the path of a CSV file or to a TensorBoard writer (torch.utils.tensorboard."
            f"SummaryWriter); to is a {type(to).__name__}."
        )


def _append(weights: DepthWeights, step: int, path: Path) -> None:
    try:
        begun = path.exists() and path.stat().st_size > 0
        if begun:
            with path.open(newline="") as file:
                header = tuple(next(csv.reader(file), ()))
            if header != _COLUMNS:
                raise ArgumentError(f"{str(path)!r} has the columns {header} and not {_COLUMNS}: name another file.")
        with path.open("a", newline="") as file:
            lines = csv.writer(file)
            if not begun:
                lines.writerow(_COLUMNS)
            for read in weights:
                for source, back, weight in zip(read.sources, read.back, read.mean(), strict=True):
                    lines.writerow((step, read.stream, read.name, source, back, f"{weight:.6g}"))
    except OSError as error:
        raise ArgumentError(f"depth weights cannot be written to {str(path)!r}: {error}.") from error


def _write_summary(weights: DepthWeights, step: int, writer: ScalarWriter) -> None:
    for read in weights:
        for name in ("entropy", "reach", "newest"):
            writer.add_scalar(f"depth_{name}/{read.stream}/{read.name}", getattr(read, name), step)
    for grid in grids(weights.reads):
        writer.add_image(f"depth_weights/{grid.stream}", _image(grid), step)


def _image(grid: WeightGrid, pixels: int = 480) -> Tensor:
    """[3, height, width]: white to dark blue, each row scaled by its largest weight; grey where nothing is seen."""
    seen = [[-1.0 if c is None else c.of_row for c in row] for row in grid.rows()]
    share = torch.tensor(seen)
    white, dark, grey = (torch.tensor(c)[:, None, None] for c in ((1.0, 1.0, 1.0), (0.03, 0.19, 0.42), (0.9, 0.9, 0.9)))
    image = torch.where(share < 0, grey, white + share.clamp_min(0) * (dark - white))
    each = max(1, pixels // max(share.shape))
    return image.repeat_interleave(each, 1).repeat_interleave(each, 2)
