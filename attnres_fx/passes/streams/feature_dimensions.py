"""Which dimension of each tensor holds the features, by what is done along it anywhere nearby.

Dimensions that pointwise work, row maps and additions keep are one and the same index: a state, what its readers make
of it before they contract or reduce, and what the addends were made as. Every operation that normalises or contracts
along a member votes for all of them. Where the votes are even (layers that mix tokens by weights, and no norm), the
features are what the weights made that the values began with.
"""

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from attnres_fx.passes.graph.kept_dimensions import kept_dimensions
from attnres_fx.passes.graph.nodes import body_of, is_floating, shape_of
from attnres_fx.passes.graph.operations import is_light, operation_of
from attnres_fx.passes.graph.row_maps import written_dimension
from attnres_fx.passes.streams.feature_evidence import Evidence, evidence_of, is_parameter

#: How the last dimension is written, whatever the rank.
LAST = -1


@dataclass(frozen=True)
class Verdict:
    """Where the features of a tensor are.

    Args:
        dimension: LAST, or the index of another dimension, from 0.
        contradiction: Where as much speaks for one dimension as for another: those, each with what speaks for it.
        because: What speaks for the dimension; None where nothing does.
    """

    dimension: int
    contradiction: tuple[tuple[int, Node], ...] = ()
    because: Node | None = None


class FeatureDimensions:
    """The feature dimensions of the tensors of a graph.

    Args:
        graph: A graph without mutations, with values on its nodes.
    """

    def __init__(self, graph: Graph) -> None:
        self._first: dict[Node, int] = {}
        self._parent: list[int] = []
        self._learned: set[Node] = set()
        self._began: dict[Node, tuple[int, int]] = {}
        self._votes: list[tuple[Evidence, int, Node]] = []
        self._verdicts: dict[Node, Verdict] = {}
        self._visit(graph)
        self._by_class: dict[int, dict[Evidence, Node]] = {}
        for kind, index, node in self._votes:
            self._by_class.setdefault(self._find(index), {}).setdefault(kind, node)

    def dimension(self, node: Node) -> int:
        """LAST, or the index of the dimension that holds the features of a node."""
        return self.verdict(node).dimension

    def trailing(self, node: Node) -> int:
        """The same counted from the end: -1 for the last dimension."""
        dimension = self.dimension(node)
        return dimension if dimension == LAST else dimension - len(shape_of(node))

    def verdict(self, node: Node) -> Verdict:
        """Where the features of a node are: its last dimension, where nothing speaks for any."""
        if node not in self._verdicts:
            self._verdicts[node] = self._decide(node)
        return self._verdicts[node]

    def keeps_rows(self, before: Node, after: Node) -> bool | None:
        """Whether a node that moves data keeps the features of another whole.

        Returns:
            None where both have them in the last dimension: then the operation itself tells.
        """
        x, y = self.dimension(before), self.dimension(after)
        if x == y == LAST:
            return None
        if written_dimension(after) == x:
            return False
        return self._find(self._index(before, x)) == self._find(self._index(after, y))

    def turns(self, before: Node, after: Node) -> bool:
        """Whether features go from the last dimension to another, or back, between two nodes."""
        return (self.dimension(before) == LAST) is not (self.dimension(after) == LAST)

    def _visit(self, graph: Graph) -> None:
        for node in graph.nodes:
            for source, before, after in kept_dimensions(node):
                self._join(self._index(source, before), self._index(node, after))
                if (made := self._began.get(source)) is not None and made[1] == before:
                    self._began[node] = min(self._began.get(node, made), (made[0], after))
            if is_parameter(node) or self._is_made_of_parameters(node):
                self._learned.add(node)
            for kind, tensor, dimension in evidence_of(node, self._learned):
                self._votes.append((kind, self._index(tensor, dimension), node))
                if tensor is node and kind == Evidence.CONTRACTION:
                    self._began[node] = (len(self._votes), dimension)
            self._visit_body(node)

    def _visit_body(self, node: Node) -> None:
        """A body that could not be inlined, its inputs the same tensors as the operands."""
        operation = operation_of(node)
        region = None if operation is None else operation.region
        body = None if region is None else body_of(node.args[region.body], node.graph.owning_module)
        if region is None or body is None:
            return
        self._visit(body.graph)
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        for operand, inside in zip(node.args[region.operands :], inputs, strict=False):
            if isinstance(operand, Node):
                self._join_all(operand, inside)
        self._join_results(node, next(n for n in body.graph.nodes if n.op == "output").args[0])

    def _join_results(self, call: Node, results: Any) -> None:
        """What a body returns is what a call gives: one tensor, or what is taken out of a tuple by its place."""
        listed = list(results) if isinstance(results, list | tuple) else [results]
        for user in (call, *call.users):
            place = 0 if user is call else user.args[1] if len(user.args) == 2 else None
            if isinstance(place, int) and place < len(listed) and isinstance(listed[place], Node):
                self._join_all(listed[place], user)

    def _is_made_of_parameters(self, node: Node) -> bool:
        inputs = node.all_input_nodes
        return bool(inputs) and all(n in self._learned for n in inputs) and is_light(node)

    def _decide(self, node: Node) -> Verdict:
        shape = shape_of(node)
        left = [d for d, size in enumerate(shape) if not (isinstance(size, int) and size == 1)]
        votes = {d: self._by_class.get(self._find(self._index(node, d)), {}) for d in left}
        because = None
        for kind in Evidence:
            voted = [d for d in left if kind in votes[d]]
            if voted:
                left, because = voted, votes[voted[-1]][kind]
            if because is not None and len({self._find(self._index(node, d)) for d in left}) == 1:
                return Verdict(LAST if left[-1] == len(shape) - 1 else left[-1], because=because)
        if because is None:
            return Verdict(LAST)
        if (made := self._began.get(node)) is not None and made[1] in left:
            return Verdict(LAST if made[1] == len(shape) - 1 else made[1], because=because)
        return Verdict(LAST, tuple((d, votes[d][min(votes[d])]) for d in left))

    # --- classes of dimensions ---

    def _index(self, node: Node, dimension: int) -> int:
        rank = len(shape_of(node))
        if node not in self._first:
            self._first[node] = len(self._parent)
            self._parent += range(len(self._parent), len(self._parent) + rank)
        return self._first[node] + dimension % rank

    def _find(self, index: int) -> int:
        parent = self._parent
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def _join(self, one: int, other: int) -> None:
        self._parent[self._find(one)] = self._find(other)

    def _join_all(self, one: Node, other: Node) -> None:
        if is_floating(one) and is_floating(other) and len(shape_of(one)) == len(shape_of(other)):
            for dimension in range(len(shape_of(one))):
                self._join(self._index(one, dimension), self._index(other, dimension))
