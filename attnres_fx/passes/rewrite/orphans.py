"""States that nobody needs once their readers read through depth attention."""

from collections.abc import Iterable

from torch.fx import Graph, Node

from attnres_fx.passes.graph.operations import asks_only_metadata, op_name
from attnres_fx.passes.rewrite.sources import SourceBuilder, Table, cast_like
from attnres_fx.passes.streams.formal_sum import FormalSums, Root


def remove_orphans(graph: Graph, sums: FormalSums, states: Iterable[tuple[Node, Table]]) -> tuple[str, ...]:
    """Erase states without users; whatever only asks for the shape of one asks a source instead.

    Args:
        graph: The graph of the states.
        sums: What the states are.
        states: The states to look at, the last first, each with its sources.

    Returns:
        The names of the nodes that were erased.
    """
    removed = []
    for node, table in states:
        if isinstance(sums.states[node], Root):
            continue
        _move_metadata_users(graph, sums, node, table)
        if not node.users:
            removed.append(node.name)
            graph.erase_node(node)
    return tuple(removed)


def _move_metadata_users(graph: Graph, sums: FormalSums, node: Node, table: Table) -> None:
    if not node.users or not all(asks_only_metadata(u, node) for u in node.users):
        return
    for user in list(node.users):
        if op_name(user) == "_assert_tensor_metadata" and not user.users:
            graph.erase_node(user)
    if not node.users:
        return
    # A builder of its own: what others have built may stand later in the graph than this node.
    with graph.inserting_before(node.next):
        stand_in = SourceBuilder(graph, sums, {}, {}).stand_in(table)
        stand_in = cast_like(graph, stand_in, node)
    node.replace_all_uses_with(stand_in)
