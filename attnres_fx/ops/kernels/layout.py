"""How a row of D numbers lies on a program: by D and the dtype alone, so that tuning never changes a sum's order."""

from dataclasses import dataclass
from typing import Literal

Direction = Literal["forward", "backward"]

#: Numbers of a row a chunk gives to one warp: 32 lanes with 16 bytes of bfloat16 each.
_PER_WARP = 256
_MOST_WARPS = 32
#: Chunks a row is held in.
_CHUNKS = 4
#: Sources that one kernel takes; more are a chain of groups.
MOST_SOURCES = 16
MOST_WIDTH = _MOST_WARPS * _PER_WARP * _CHUNKS


@dataclass(frozen=True)
class Layout:
    """chunks of `chunk` numbers, the last one masked where D is no multiple, on `warps` warps."""

    chunk: int
    chunks: int
    warps: int


def layout_of(width: int, direction: Direction, itemsize: int) -> Layout:
    """The layout of rows of `width` numbers, 1 to MOST_WIDTH, of `itemsize` bytes each."""
    # Backward holds several rows in registers at a time: with 16-bit loads in flight beside them, half a row each.
    most = 2 if direction == "backward" and itemsize == 2 else _CHUNKS
    warps = 1
    while warps < _MOST_WARPS and width > warps * _PER_WARP * most:
        warps *= 2
    chunk = min(warps * _PER_WARP, 1 << (width - 1).bit_length())
    return Layout(chunk, -(-width // chunk), warps)
