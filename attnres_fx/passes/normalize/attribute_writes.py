"""What a graph writes to and others hold: who must see what it held before the next write."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.aliasing import aliased_argument
from attnres_fx.passes.graph.mutation_order import find_writes, first_of_each_attribute, storage_owner
from attnres_fx.passes.graph.row_maps import match_row_maps


@dataclass(frozen=True)
class AttributeWrites:
    """The writes of a graph into parameters and buffers, which stay, and into inputs, which are put off to the end.

    Attributes:
        first: A node that gets a parameter or a buffer that is written to, and the first one that gets the same.
        snapshots: One of these or an input, and how often it was written to: what it holds then is needed after it is
            written again. A sum, or what a row is multiplied by, is read anew where the stream is read.
        elsewhere: Whether anything else than parameters and buffers is written to.
    """

    first: dict[Node, Node]
    snapshots: frozenset[tuple[Node, int]]
    elsewhere: bool


def find_attribute_writes(graph: Graph) -> AttributeWrites:
    """Look for writes into parameters, buffers and inputs.

    Args:
        graph: A graph with values on its nodes. It is left as it is.

    Returns:
        What is written to, and what it held before is still needed.
    """
    targets = find_writes(graph).targets
    written = {owner for owners in targets.values() for owner in owners}
    attributes = {owner for owner in written if owner.op == "get_attr"}
    held = attributes | {owner for owner in written if owner.op == "placeholder"}
    first = {n: f for n, f in first_of_each_attribute(graph).items() if f in attributes}
    return AttributeWrites(
        first, _find_snapshots(graph, targets, held) if held else frozenset(), bool(written - attributes)
    )


def _find_snapshots(
    graph: Graph, targets: Mapping[Node, tuple[Node, ...]], held: set[Node]
) -> frozenset[tuple[Node, int]]:
    times: Counter[Node] = Counter()
    needed: set[tuple[Node, int]] = set()
    owners = first_of_each_attribute(graph)
    for node in graph.nodes:
        if _may_be_done_later(node):
            seen = {storage_owner(i, owners) for i in node.all_input_nodes}
            needed |= {(owner, times[owner]) for owner in seen & held}
        times.update(owner for owner in targets.get(node, ()) if owner in held)
    return frozenset((owner, when) for owner, when in needed if when < times[owner])


def _may_be_done_later(node: Node) -> bool:
    if aliased_argument(node) is not None:
        return False
    return match_addition(node) is not None or bool(match_row_maps(node))
