"""The depth of a model in numbers, as data."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SublayerProfile:
    """What one sublayer writes into a stream.

    Attributes:
        index: From 1; 0 is the root, which the stream begins with.
        name: The modules that make it.
        magnitude: Root mean square of what it writes, over all tokens and features; None where no read tells.
        gradient: Norm of the loss's gradient with respect to what it writes; None without a loss.
        share: Of the state that the last read sees, averaged over tokens: `<c v, h> / <h, h>` for what it wrote, `v`,
            and the weight `c` that it has there. Shares of a stream add up to one; a negative one is taken away again.
            None where the state is no sum of what was written (norms on the stream), or the sublayer is behind a
            summary (`local`).
    """

    index: int
    name: str
    magnitude: float | None
    gradient: float | None
    share: float | None


@dataclass(frozen=True)
class ReadProfile:
    """What one read sees.

    Attributes:
        name: Of the read.
        position: Sublayers written before it.
        magnitude: Root mean square of the state that it returns.
        sources: Labels of what the state is made of, oldest first.
        mixture: [S], adds up to one: how much each source brings, its weight times its norm, averaged over tokens.
            Empty where the state is no sum of its sources.
        entropy: Nats of the mixture, per token and then averaged.
        reach: How many sublayers back it looks, averaged over the mixture.
        even_reach: What that is where all sources bring the same.
    """

    name: str
    position: int
    magnitude: float
    sources: tuple[str, ...]
    mixture: tuple[float, ...]
    entropy: float | None
    reach: float | None
    even_reach: float


@dataclass(frozen=True)
class StreamProfile:
    """One residual stream.

    Attributes:
        name: Of the stream.
        root: What it begins with.
        sublayers: In order.
        reads: In execution order.
        source_shares: Of the state that the last read sees, by its sources.
    """

    name: str
    root: SublayerProfile
    sublayers: tuple[SublayerProfile, ...]
    reads: tuple[ReadProfile, ...]
    source_shares: tuple[tuple[str, float], ...] = ()

    @property
    def growth(self) -> float | None:
        """The magnitude of the state at the last read over that of the root."""
        if not self.reads or not self.root.magnitude:
            return None
        return self.reads[-1].magnitude / self.root.magnitude

    @property
    def halves(self) -> tuple[float, float] | None:
        """Shares of the last state that the first half of the sublayers has, and the second; the root has the rest."""
        shares = [s.share for s in self.sublayers]
        known = [s for s in shares if s is not None]
        if len(known) < len(shares) or len(known) < 2:
            return None
        middle = len(known) // 2
        return sum(known[:middle]), sum(known[-middle:])

    @property
    def dilutes(self) -> bool | None:
        """Whether the first half of the sublayers has less of the last state than the second half; None: unknown."""
        return None if self.halves is None else self.halves[0] < self.halves[1]

    def read_after(self, sublayer: int) -> ReadProfile | None:
        """The first read that sees so many sublayers."""
        return next((r for r in self.reads if r.position == sublayer), None)

    def verdict(self) -> str:
        """Does the model dilute its early layers, and by how much, in a sentence or two."""
        grown = "" if self.growth is None else f"the state grows {self.growth:.2g}-fold from the root to the last read"
        if self.halves is None:
            why = "its last read sees the summary of a block" if self.source_shares else "norms stand on the stream"
            return f"{self.name}: whether early layers are diluted is not known, because {why}; {grown}."
        first, second = self.halves
        answer = "early layers are not diluted"
        if self.dilutes:
            answer = "early layers are diluted" + (f" {second / first:.2g}-fold" if first > 0 else "")
        root = f", the root {self.root.share:.0%}" if self.root.share is not None else ""
        return (
            f"{self.name}: {answer}. Of what its last read sees, the first half of the {len(self.sublayers)} sublayers "
            f"makes {first:.0%}, the second half {second:.0%}{root}; {grown}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {**asdict(self), "growth": self.growth, "halves": self.halves, "dilutes": self.dilutes}
