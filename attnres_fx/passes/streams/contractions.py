"""Which tensors a node contracts, in whatever spelling."""

from torch.fx import Node

from attnres_fx.passes.graph.nodes import is_floating
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, moves_data, op_name


def contracted_tensors(node: Node) -> list[Node]:
    """The factors of a product of tensors, or of a product that is summed over a dimension.

    Args:
        node: Any node of a graph with values on its nodes.

    Returns:
        The floating factors; empty where the node contracts none.
    """
    if has_trait(node, Trait.MIXES):
        return [n for n in node.all_input_nodes if is_floating(n)]
    if op_name(node) != "sum" or not node.all_input_nodes:
        return []
    product = node.all_input_nodes[0]
    while moves_data(product) and product.all_input_nodes:
        product = product.all_input_nodes[0]
    return [n for n in product.all_input_nodes if is_floating(n)] if op_name(product) == "mul" else []
