"""Which values of a graph depend on which, and whether through more than elementwise work."""

from collections.abc import Callable, Iterable

from torch.fx import Graph, Node

from attnres_fx.passes.graph.aliasing import mutated_arguments, storage_of
from attnres_fx.passes.graph.mutation_order import first_of_each_attribute
from attnres_fx.passes.graph.operations import asks_only_metadata, is_light


def reaches_results(nodes: Iterable[Node], bars: Callable[[Node], bool]) -> bool:
    """Whether the results of a graph take in some nodes by another way than through those that bar it."""
    stack = [n for n in nodes if not bars(n)]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.op == "output":
            return True
        fresh = [u for u in node.users if u not in seen and not bars(u)]
        seen.update(fresh)
        stack += fresh
    return False


class Dependence:
    """Which nodes depend on which anchors, at all and through more than elementwise operations.

    Args:
        graph: The graph; nodes that are added to it later are not known.
        anchors: The nodes that others are asked to depend on: one bit is kept for each.

    Attributes:
        written: The tensors that a node writes into, and what they are views of. Whatever they were copies of, they
            hold something else after that.
    """

    def __init__(self, graph: Graph, anchors: set[Node]) -> None:
        self._bit = {node: 1 << i for i, node in enumerate(anchors)}
        self._any: dict[Node, int] = {}
        self._heavy: dict[Node, int] = {}
        self.written: set[Node] = set()
        attributes = first_of_each_attribute(graph)
        for node in graph.nodes:
            first = attributes.get(node, node)  # got again after it was written to
            reached, heavy = self._any.get(first, 0), self._heavy.get(first, 0)
            for source in node.all_input_nodes:
                if asks_only_metadata(node, source):
                    continue
                reached |= self._any[source] | self._bit.get(source, 0)
                heavy |= self._heavy[source]
            self._any[node] = reached
            self._heavy[node] = heavy if is_light(node) else reached
            for target in mutated_arguments(node):
                self._write(node, target)

    def _write(self, node: Node, target: Node) -> None:
        for seen in storage_of(target):
            self.written.add(seen)
            self._any[seen] |= self._any[node]
            self._heavy[seen] |= self._heavy[node]

    def at_all(self, node: Node, anchor: Node) -> bool:
        """Whether `node` depends on `anchor`, however little is done on the way."""
        return bool(self._any[node] & self._bit.get(anchor, 0))

    def is_branch(self, node: Node, anchor: Node) -> bool:
        """Whether `node` depends on `anchor` through at least one operation that is not elementwise."""
        return bool(self._heavy[node] & self._bit.get(anchor, 0))
