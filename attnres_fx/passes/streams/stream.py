"""Residual streams as data: root, terms, reads, and what was left alone and why.

Nodes are named, not held, so that two analyses can be compared and printed; the rewrite looks the names up again in
the graph that was analysed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from attnres_fx.errors import StreamNameError
from attnres_fx.passes.streams.formal_sum import FormalSums
from attnres_fx.passes.streams.refusals import Refusal


@dataclass(frozen=True)
class Term:
    """A value written into a stream.

    node: what holds the value. written_by: the addition that writes it (the value itself for the root).
    sublayer: index of the sublayer it belongs to; -1 for the root, None for a term outside the chain.
    """

    node: str
    written_by: str
    sublayer: int | None
    module: str
    line: str


@dataclass(frozen=True)
class Read:
    """A place where a state is consumed by something that is not part of the sum.

    state: the node that holds the sum. site: the node whose value the read replaces, the state itself or
        the last row map that all consumers share. position: sublayers written before it. extras: terms
        it sees that the chain does not go on with. consumers: the nodes that consume it.
    """

    name: str
    state: str
    site: str
    position: int
    extras: tuple[str, ...]
    consumers: tuple[str, ...]
    module: str
    line: str

    @property
    def sees_only_root(self) -> bool:
        return self.position == 0 and not self.extras


@dataclass(frozen=True)
class Stream:
    """One residual stream.

    width: D, the size of the last dimension. post_norm: whether a norm sits on the stream, so that every
        state has two terms and each norm reads. nested_in: the stream whose sublayer it is inside, if any.
    """

    name: str
    root: Term
    terms: tuple[Term, ...]
    reads: tuple[Read, ...]
    width: int
    post_norm: bool = False
    nested_in: str | None = None

    @property
    def num_sublayers(self) -> int:
        return 1 + max((t.sublayer for t in self.terms if t.sublayer is not None), default=-1)

    @property
    def depth_reads(self) -> tuple[Read, ...]:
        """The reads that get an operator: all that see more than the root."""
        return tuple(r for r in self.reads if not r.sees_only_root)


@dataclass(frozen=True)
class StreamSet:
    """All streams of one graph, what looked like one and was refused, and the sums they were read from."""

    streams: tuple[Stream, ...]
    refusals: tuple[Refusal, ...]
    sums: FormalSums = field(compare=False, repr=False)

    def select(self, wanted: str | Sequence[str]) -> tuple[Stream, ...]:
        """`"main"`, `"all"`, or streams by name. Raises StreamNameError for a name that does not exist."""
        if wanted == "all":
            return self.streams
        if wanted == "main":
            return tuple(s for s in self.streams if s.nested_in is None)
        names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        known = [s.name for s in self.streams]
        for name in names:
            if name not in known:
                raise StreamNameError(
                    f"streams={wanted!r}: there is no stream {name!r}. This model has "
                    f"{', '.join(map(repr, known)) or 'none'}; 'main' and 'all' also work."
                )
        return tuple(s for s in self.streams if s.name in names)
