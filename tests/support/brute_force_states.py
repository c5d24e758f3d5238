"""What the brute force holds: states as lists of terms, handles on them, and notes of a first run."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Map = Callable[[Tensor], Tensor]
Terms = list[tuple[int, Tensor]]


@dataclass
class State:
    """The value of one stream at one point: what was written, oldest first, with every factor applied.

    terms: the root (or, in `local`, the incoming summary) and what was written since; the numbers are
    positions in the stream's own list of terms, -1 for a term that the stream does not go on with.
    seen: what a read here sees; other than `terms` only where a local block has ended, because the
    stream then goes on from the summary and reads at the end see the whole block.
    """

    number: int
    stream: int
    terms: list[tuple[int, Tensor]]
    count: int
    seen: list[tuple[int, Tensor]]
    extra: bool = False

    @property
    def total(self) -> Tensor:
        total = self.terms[0][1]
        for _, term in self.terms[1:]:
            total = total + term
        return total


@dataclass
class Handle:
    """What a program holds: a storage (shared by its aliases) and the views between the two."""

    storage: list[State]
    maps: tuple[Map, ...] = ()

    @property
    def state(self) -> State:
        return self.storage[0]

    def viewed(self, value: Tensor) -> Tensor:
        for view in self.maps:
            value = view(value)
        return value

    def mapped_terms(self) -> list[tuple[int, Tensor]]:
        return [(i, self.viewed(t)) for i, t in self.state.terms]

    def mapped_seen(self) -> list[tuple[int, Tensor]]:
        return [(i, self.viewed(t)) for i, t in self.state.seen]


@dataclass
class ReadNote:
    """A read as the first run saw it. prefix: terms of the stream it sees, the root among them."""

    name: str
    stream: int
    prefix: int
    extra: bool


@dataclass
class Notes:
    """What the first run found out: reads by state number, and the length of each stream."""

    reads: dict[int, ReadNote] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def cuts(self, stream: int) -> list[int]:
        """Term counts at which a sublayer ends; the root alone is the first."""
        seen = {r.prefix for r in self.reads.values() if r.stream == stream}
        return sorted({1, self.lengths[stream], *seen})

    def sublayers(self, stream: int) -> int:
        return len(self.cuts(stream)) - 1

    def named(self) -> dict[int, str]:
        """Names of the reads that see more than the root; repeats numbered, stream by stream, in state order."""
        names: dict[int, str] = {}
        seen: Counter[str] = Counter()
        for number, read in sorted(self.reads.items(), key=lambda item: (item[1].stream, item[0])):
            if read.prefix == 1 and not read.extra:
                continue
            seen[read.name] += 1
            names[number] = f"{read.name}#{seen[read.name]}" if seen[read.name] > 1 else read.name
        return names
