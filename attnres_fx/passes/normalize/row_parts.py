"""Parts of a tensor with something added to them, and pieces taken again of another tensor."""

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.nodes import copy_call, same_shape
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, moves_data
from attnres_fx.passes.graph.pieces import Piece, pieces_of
from attnres_fx.passes.normalize.dependences import dependence_of


@dataclass(frozen=True)
class Part:
    """A node that is a piece of a tensor, perhaps with something added to it.

    Args:
        pieces: What it is a piece of, before anything was added.
        below: The part that the addend was added to; None of a piece.
        node: The node that holds it.
        addend, scale: What was added.
    """

    pieces: tuple[Piece, ...]
    node: Node
    below: "Part | None" = None
    addend: Node | None = None
    scale: float = 1

    def sums(self) -> "list[Part]":
        """The additions that made it, the first one first."""
        found = []
        part: Part | None = self
        while part is not None and part.below is not None:
            found.append(part)
            part = part.below
        return found[::-1]


class Parts:
    """What nodes of a graph are known to be pieces of.

    Args:
        graph: The graph, with values on its nodes and without mutations.
    """

    def __init__(self, graph: Graph) -> None:
        self._known: dict[Node, Part | None] = {}
        self._same = _equal_views(graph)

    def forget(self) -> None:
        """Start anew, after the graph was changed before the nodes that were asked for."""
        self._known.clear()

    def are_same(self, a: Node, b: Node) -> bool:
        """Whether two nodes are one, or take the same view of the same tensor."""
        return self._same.get(a, a) is self._same.get(b, b)

    def of(self, node: Node) -> Part | None:
        """A node as a piece with additions; a walk instead of recursion, since streams are long."""
        path = [node]
        while path:
            current = path[-1]
            if current in self._known:
                path.pop()
                continue
            pieces = tuple(pieces_of(current))
            below = [] if pieces else summands(current)
            unknown = [n for n, _, _ in below if n not in self._known]
            if unknown:
                path += unknown
                continue
            self._known[current] = Part(pieces, current) if pieces else self._added(current, below)
        return self._known[node]

    def _added(self, node: Node, below: list[tuple[Node, Node | None, float]]) -> Part | None:
        for operand, addend, scale in below:
            part = self._known[operand]
            if part is None:
                continue
            if addend is None:  # handed on as it is
                return Part(part.pieces, node, part.below, part.addend, part.scale)
            if same_shape(operand, node):
                return Part(part.pieces, node, part, addend, scale)
        return None


def piece_of_other(piece: Piece, other: Node) -> Node:
    """A piece taken again, at the graph's insertion point, of a tensor in the place of its source."""
    copied = {piece.source: other}
    for node in reversed(_path(piece)):
        copied[node] = copy_call(node, dict(copied))
    return copied[piece.node]


def _path(piece: Piece) -> list[Node]:
    """The nodes from a piece down to what it is a piece of."""
    path = [piece.node]
    while path[-1].args[0] is not piece.source:
        path.append(path[-1].args[0])  # type: ignore[arg-type]
    return path


def may_stand_before(piece: Piece, place: Node) -> bool:
    """Whether everything that a piece takes besides its source is there before a place."""
    path = _path(piece)
    inside = {*path, piece.source}
    return all(n in inside or n < place for p in path for n in p.all_input_nodes)


def may_be_written(written: list[Node], whole: Node) -> bool:
    """Whether what is written into rows of a tensor may be part of a stream.

    That is a branch of the tensor, with more than elementwise work in it, or what does not depend on a running sum.
    What is made of the rows alone by elementwise work is another form of them: a rotation of a query's features.
    """
    found = _dependences(written, whole)
    return "elementwise" not in found and ("branch" in found or match_addition(_bases(whole)[-1]) is not None)


def writes_branch(written: list[Node], whole: Node) -> bool:
    """Whether some of what is written into rows of a tensor is a branch of it."""
    return "branch" in _dependences(written, whole)


def _dependences(written: list[Node], whole: Node) -> list[str]:
    bases = _bases(whole)
    return [dependence_of(n, set(bases), bases[-1]) for n in written]


def _bases(whole: Node) -> list[Node]:
    """A tensor and what it is another form of, the earliest last."""
    bases = [whole]
    while moves_data(bases[-1]) and bases[-1].args and isinstance(bases[-1].args[0], Node):
        bases.append(bases[-1].args[0])
    return bases


def summands(node: Node) -> list[tuple[Node, Node | None, float]]:
    """What a node may be a sum onto: the operand, what is added to it, and the scale of that."""
    if has_trait(node, Trait.IDENTITY) and node.args and isinstance(node.args[0], Node):
        return [(node.args[0], None, 1)]
    a = match_addition(node)
    if a is None:
        return []
    ways = ((a.left, a.left_scale, a.right, a.right_scale), (a.right, a.right_scale, a.left, a.left_scale))
    return [(left, right, scale) for left, kept, right, scale in ways if kept == 1]


def _equal_views(graph: Graph) -> dict[Node, Node]:
    """Nodes that take the same view of the same tensor as one before them: code often takes a view again."""
    first: dict[Any, Node] = {}
    same: dict[Node, Node] = {}
    for node in graph.nodes:
        if has_trait(node, Trait.RESHAPE | Trait.TOKEN_MOVE) and not node.kwargs:
            args = map_arg(node.args, lambda n: same.get(n, n))
            found = first.setdefault((node.op, node.target, repr(args)), node)
            if found is not node:
                same[node] = found
    return same
