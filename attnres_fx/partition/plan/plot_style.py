"""What the plots of a plan share: colours, sizes, legends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's colours, told apart by every kind of colour vision.
COLOURS = {"F": "#0072B2", "B": "#E69F00", "I": "#E69F00", "W": "#009E73"}
NAMES = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}
HOP_COLOURS = {"F": "#003B5C", "B": "#8A3B00", "I": "#8A3B00"}
IDLE = "#EFEFEF"
#: Light, so that numbers stay readable on them; neighbours differ in lightness too.
BLOCK_COLOURS = ("#56B4E9", "#F0E442", "#CC79A7", "#B8E0D2")
NO_BLOCK = "#D9D9D9"
WIDTH_INCHES = 14.0
FONT, SMALL = 8.0, 7.0
#: Of the axes from left to right, about.
POINTS = 72 * WIDTH_INCHES * 0.92
BAR = 0.74


def legend_below(handles: Sequence[Any], axes: "Axes") -> None:
    axes.legend(
        handles=list(handles),
        ncols=len(handles),
        loc="upper right",
        bbox_to_anchor=(1, 0),
        borderaxespad=2.2,
        fontsize=FONT,
        frameon=False,
    )


def counted(number: int, thing: str, plural: str = "s") -> str:
    return f"{number} {thing}{plural if number != 1 else ''}"
