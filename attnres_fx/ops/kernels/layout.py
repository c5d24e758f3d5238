"""How a row of D numbers lies on a program: decided by D alone, so that tuning never changes a sum's order."""

import math
from dataclasses import dataclass

#: Numbers of a row a chunk gives to one warp: 32 lanes with 16 bytes of bfloat16 each.
_PER_WARP = 256
_MOST_CHUNKS = 4
MOST_WIDTH = 32 * _PER_WARP * _MOST_CHUNKS


@dataclass(frozen=True)
class Layout:
    """chunks of `chunk` numbers, the last one masked where D is no multiple, on `warps` warps."""

    chunk: int
    chunks: int
    warps: int


def layout_of(width: int) -> Layout:
    """The layout of rows of `width` numbers, 1 to MOST_WIDTH."""
    warps = 1
    while warps < 32 and width > warps * _PER_WARP * _MOST_CHUNKS:
        warps *= 2
    chunk = min(warps * _PER_WARP, 1 << max(0, math.ceil(math.log2(max(width, 1)))))
    return Layout(chunk, -(-width // chunk), warps)
