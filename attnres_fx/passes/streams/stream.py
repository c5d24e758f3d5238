"""Residual streams as data: root, terms, reads, and what was left alone and why.

Nodes are named, not held, so that two analyses can be compared and printed; the rewrite looks the names up again in
the graph that was analysed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from attnres_fx.errors import StreamNameError
from attnres_fx.passes.streams.formal_sum import FormalSums
from attnres_fx.passes.streams.refusals import Refusal
from attnres_fx.shown import counted


@dataclass(frozen=True)
class Term:
    """A value written into a stream.

    Args:
        node: What holds the value.
        written_by: The addition that writes it; the value itself for the root.
        sublayer: Index of the sublayer that it belongs to; -1 for the root, None for a term outside the chain.
        module: Path of the module that computes it.
        line: `file:line` of the addition in the layer's code; empty where the tracer kept none.
        made_by: Path of the part that makes it, seen through dropout, factors and views.
    """

    node: str
    written_by: str
    sublayer: int | None
    module: str
    line: str
    made_by: str = ""


@dataclass(frozen=True)
class Read:
    """A place where a state is consumed by something that is not part of the sum.

    Args:
        name: The module that consumes it first, else its place, `<stream>.read_<position>`; numbered where one name
            has several reads; `"output"` for the model's result.
        state: The node that holds the sum.
        site: The node whose value the read replaces: the state, or the last row map that all consumers share.
        position: How many sublayers are written before it.
        extras: Terms it sees that the chain does not go on with.
        consumers: The nodes that consume it.
        module: Path of the module that consumes it first.
        line: `file:line` of that in the code of the layer that the stream runs through, which may call the module;
            empty where the tracer kept none.
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
        """Whether it stands before the first sublayer: such a read has no parameters."""
        return self.position == 0 and not self.extras


@dataclass(frozen=True)
class Stream:
    """One residual stream.

    Args:
        name: The module path that its terms and reads share, numbered where several share one.
        root: The value that it begins with.
        terms: What is written into it, the root aside.
        reads: The places that consume its states.
        width: D, the size of the dimension that holds the features.
        post_norm: Whether norms stand on the stream itself: every state has two terms then, and each norm reads.
        nested_in: The stream whose sublayer it is inside; None for the others.
        around: A stream inside one of its sublayers that does more than it does itself; None for the others.
        dimension: Which dimension of the root holds the features; -1 for the last.
        made_by: The modules that make the root, or the inputs, as a person would name them.
    """

    name: str
    root: Term
    terms: tuple[Term, ...]
    reads: tuple[Read, ...]
    width: int
    post_norm: bool = False
    nested_in: str | None = None
    around: str | None = None
    dimension: int = -1
    made_by: str = ""

    def __repr__(self) -> str:
        return (
            f"Stream({self.name!r} from {self.made_by or self.root.module or self.root.node}, "
            f"{counted(self.num_sublayers, 'sublayer')}, {counted(len(self.depth_reads), 'read')}, width {self.width})"
        )

    @property
    def is_main(self) -> bool:
        """Whether it holds the sublayers: it is inside no other stream, and goes around none that does more."""
        return self.nested_in is None and self.around is None

    @property
    def num_sublayers(self) -> int:
        """How many sublayers write into it."""
        return 1 + max((t.sublayer for t in self.terms if t.sublayer is not None), default=-1)

    @property
    def depth_reads(self) -> tuple[Read, ...]:
        """The reads that get an operator: all that see more than the root."""
        return tuple(r for r in self.reads if not r.sees_only_root)


@dataclass(frozen=True)
class StreamSet:
    """What was found in one graph.

    Args:
        streams: All its residual streams.
        refusals: What looks like one and was left alone, or stops a conversion.
        sums: The formal sums that they were read from.
    """

    streams: tuple[Stream, ...]
    refusals: tuple[Refusal, ...]
    sums: FormalSums = field(compare=False, repr=False)

    def select(self, selection: str | Sequence[str]) -> tuple[Stream, ...]:
        """Streams by name.

        Args:
            selection: One name or several, `"all"`, or `"main"` for those inside no other stream that go around none.

        Returns:
            The streams asked for, in graph order.

        Raises:
            StreamNameError: There is no stream of that name.
        """
        if selection == "all":
            return self.streams
        if selection == "main":
            return tuple(s for s in self.streams if s.is_main)
        names = (selection,) if isinstance(selection, str) else tuple(selection)
        known = [s.name for s in self.streams]
        for name in names:
            if name not in known:
                raise StreamNameError(
                    f"streams={selection!r}: there is no stream {name!r}. This model has "
                    f"{', '.join(map(repr, known)) or 'none'}; 'main' and 'all' also work."
                )
        return tuple(s for s in self.streams if s.name in names)
