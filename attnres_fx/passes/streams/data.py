"""What a graph computes from its inputs, as opposed to what it makes of its parameters alone."""

from collections.abc import Iterable

from torch import nn
from torch.fx import Node

from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.graph.operations import asks_only_metadata
from attnres_fx.passes.graph.row_maps import match_row_maps


def is_weight(node: Node) -> bool:
    """Whether a node holds a parameter or a buffer.

    A tracer that hands them in as inputs shows parameters alone.
    """
    return node.op == "get_attr" or (node.op == "placeholder" and isinstance(tensor_of(node), nn.Parameter))


def is_form_of_weight(node: Node) -> bool:
    """Whether a node is a parameter or a buffer, a cast or view of one, or one times a number."""
    while len(node.all_input_nodes) == 1 and (maps := match_row_maps(node)):
        node = maps[0].state
    return is_weight(node)


def find_data(nodes: Iterable[Node]) -> set[Node]:
    """The nodes that are inputs or are computed from the values of one; a size that is asked of it is none.

    Args:
        nodes: The nodes of a graph, in its order.
    """
    data: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            if not is_weight(node):
                data.add(node)
        elif any(n in data and not asks_only_metadata(node, n) for n in node.all_input_nodes):
            data.add(node)
    return data
