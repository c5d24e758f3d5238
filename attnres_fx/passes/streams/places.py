"""On which line of the user's code a stream is read and written: that of the layer, not of the norm that it calls."""

from collections.abc import Iterable, Sequence

from torch.fx import Node

from attnres_fx.passes.graph.frames import PACKAGE, TOOLS, USER, Frame, frames_of, of_owner, owner_of_class
from attnres_fx.passes.graph.nodes import source_line


class Places:
    """The lines of one stream.

    Whose code they are in follows from the module whose call holds the whole stream: where that is the user's own, so
    are the lines, although the layers may be a library's; where a library's model is called, they are its layers'.

    Args:
        written: The additions that write to the stream.
    """

    def __init__(self, written: Sequence[Node]) -> None:
        self._owner = _owner_of_call(written)

    def of_write(self, addition: Node) -> str:
        """`file:line` of an addition; empty where the tracer kept none."""
        frames = self._frames(addition)
        return str(frames[-1]) if frames else source_line(addition)

    def of_read(self, consumer: Node, beside: Iterable[Node]) -> str:
        """`file:line` of a read: in the innermost function that takes part in both the read and an addition beside it.

        Args:
            consumer: What takes the state first.
            beside: The additions before and after the read, as far as there are any.
        """
        frames = self._frames(consumer)
        known = [self._frames(n) for n in beside]
        if not frames:
            return next((str(k[-1]) for k in known if k), source_line(consumer))
        shared = max((_shared(frames, k) for k in known if k), default=len(frames))
        return str(frames[max(shared, 1) - 1])

    def _frames(self, node: Node) -> tuple[Frame, ...]:
        frames = frames_of(node)
        return of_owner(frames, self._owner) or frames


def _shared(frames: Sequence[Frame], others: Sequence[Frame]) -> int:
    """How many of the first frames are of calls that others are in as well."""
    for i, (one, other) in enumerate(zip(frames, others, strict=False)):
        if one != other:
            return i + one.in_same_function(other)
    return min(len(frames), len(others))


def _owner_of_call(written: Sequence[Node]) -> int:
    """Whose code the innermost module is of which one call runs all of these nodes."""
    stacks = [list((n.meta.get("nn_module_stack") or {}).items()) for n in written]
    kinds = []
    for entries in zip(*stacks, strict=False):
        if len({key for key, _ in entries}) > 1:
            break
        kinds.append(entries[0][1][1] if isinstance(entries[0][1], tuple | list) else None)
    owners = [owner for kind in reversed(kinds) if (owner := owner_of_class(kind)) not in (None, TOOLS)]
    return owners[0] if owners and owners[0] is not None else _outermost(written)


def _outermost(written: Sequence[Node]) -> int:
    """Whose code is nearest to the user in the stacks of nodes."""
    return USER if any(of_owner(frames_of(n), USER) for n in written) else PACKAGE
