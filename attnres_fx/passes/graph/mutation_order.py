"""What is written in place, and who must come after: an order that no argument of a node shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from attnres_fx.passes.graph.aliasing import aliased_argument, mutated_arguments, returns_what_it_writes
from attnres_fx.passes.graph.operations import writes_in_place


@dataclass(frozen=True, eq=False)
class Writes:
    """The writes into storages of a graph.

    Args:
        needs: For each node that looks at a storage after it was written, the writes it comes after.
        targets: Every write, with the nodes that own the storages it writes to.
    """

    needs: Mapping[Node, tuple[Node, ...]]
    targets: Mapping[Node, tuple[Node, ...]]

    def inputs(self, node: Node) -> list[Node]:
        """What a node depends on: its arguments, and the writes to their storages before it."""
        return [*node.all_input_nodes, *self.needs.get(node, ())]


def find_writes(graph: Graph) -> Writes:
    """Find all writes into storages of a graph.

    Args:
        graph: A graph with values on its nodes. It is left as it is.

    Returns:
        The writes, and which nodes come after which of them.
    """
    owners = first_of_each_attribute(graph)
    targets: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output") and (written := mutated_arguments(node)):
            targets[node] = tuple(dict.fromkeys(storage_owner(t, owners) for t in written))
    if not targets:
        return Writes({}, {})
    done: dict[Node, list[Node]] = {owner: [] for written in targets.values() for owner in written}
    needs: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        before = [w for i in node.all_input_nodes for w in done.get(storage_owner(i, owners), ())]
        if before:
            needs[node] = tuple(dict.fromkeys(before))
        for owner in targets.get(node, ()):
            done[owner].append(node)
    return Writes(needs, targets)


def written_attributes(graph: Graph) -> frozenset[str]:
    """The parameters and buffers that a graph writes into, by name; its nodes need no values."""
    found = set()
    for node in graph.nodes:
        if not writes_in_place(node) or not node.args:
            continue
        below: Any = node.args[0]
        while isinstance(below, Node) and below.args:
            below = below.args[0]
        if isinstance(below, Node) and below.op == "get_attr":
            found.add(str(below.target))
    return frozenset(found)


def first_of_each_attribute(graph: Graph) -> dict[Node, Node]:
    """For each node that gets an attribute, the first one that gets the same: symbolic traces have one a use."""
    first: dict[Any, Node] = {}
    owners = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            owners[node] = first.setdefault(_attribute(node), node)
    return owners


def _attribute(node: Node) -> Any:
    """What tells an attribute from others: the tensor, which several paths may lead to, or the path."""
    try:
        held = attrgetter(str(node.target))(node.graph.owning_module)
    except AttributeError:
        return node.target
    return id(held) if isinstance(held, Tensor) else node.target


def storage_owner(node: Node, known: dict[Node, Node]) -> Node:
    """The node that owns the storage of a node's value; `known` has the attributes, and is filled in."""
    if node not in known:
        below = aliased_argument(node)
        written = mutated_arguments(node) if node.op not in ("placeholder", "get_attr", "output") else []
        if below is None and written and returns_what_it_writes(node):
            below = written[0]
        known[node] = node if below is None else storage_owner(below, known)
    return known[node]
