"""Figures without a window, in one style."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: One colour a method, in every figure; what is not here is grey.
COLOURS = {
    "residual": "#444444",
    "block": "#d1495b",
    "full": "#00798c",
    "local": "#edae49",
    "static": "#6a4c93",
    "mhc": "#6b8e23",
}
GREY = "#999999"


def panels(titles: Sequence[str], height: float = 3.0) -> "tuple[Figure, list[Axes]]":
    """A row of empty plots.

    Args:
        titles: Of each.
        height: Inches.

    Returns:
        The figure and its plots.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(titles), height), layout="constrained")
    axes = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for each, title in zip(axes, titles, strict=True):
        each.set_title(title, fontsize=9)
        each.tick_params(labelsize=7)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes
