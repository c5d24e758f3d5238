"""What a read attends to, as plain data: the root, a sublayer's output, a block, a partial sum, a summary."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, order=True)
class Source:
    """One thing a read attends to.

    Args:
        kind: `"root"` (v_0), `"sublayer"` (the output of sublayer `start`), `"block"` (the sum of all of block
            `block`), `"partial"` (the sum of the sublayers of block `block` written so far), `"summary"` (what block
            `block` receives: the read at the end of the block before it) or `"copy"` (number `start` of the copies
            that hyper-connections carry).
        block: Index of the block.
        start: The first sublayer it sums; with `stop` a half-open range, empty for the root and for a summary.
        stop: The sublayer after the last one it sums.
    """

    kind: Literal["root", "sublayer", "block", "partial", "summary", "copy"]
    block: int = 0
    start: int = 0
    stop: int = 0

    @property
    def group(self) -> "Source":
        """What it is counted under while a block is written: its partial sums and its whole sum are one running sum."""
        return Source("block", self.block) if self.kind in ("block", "partial") else self

    def __str__(self) -> str:
        names = {
            "root": "v_0",
            "sublayer": f"v_{self.start + 1}",
            "block": f"b_{self.block + 1}",
            "partial": f"b_{self.block + 1}[:{self.stop - self.start}]",
            "summary": f"c_{self.block + 1}",
            "copy": f"x_{self.start + 1}",
        }
        return names[self.kind]


ROOT = Source("root")


@dataclass(frozen=True)
class Window:
    """The newest sources, beyond which a read does not look.

    Args:
        size: How many.
        keeps_root: Whether the root is seen beside them.
    """

    size: int
    keeps_root: bool = True

    def seen(self, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        """What is left of sources that stand oldest first, the root before all others."""
        newest = sources[-self.size :]
        return (ROOT, *newest) if self.keeps_root and ROOT not in newest else newest

    def count(self, num_sources: int) -> int:
        """`len(seen(sources))` of so many sources."""
        return min(num_sources, self.size + self.keeps_root)


class SourceSpan(NamedTuple):
    """A source that crosses the cuts before the sublayers `maker` + 1 to `last`, and no others.

    Args:
        source: The source.
        maker: The sublayer after which it is there; 0 for the root, which is made beside the first sublayer.
        last: The sublayer that begins at the last cut.
    """

    source: Source
    maker: int
    last: int
