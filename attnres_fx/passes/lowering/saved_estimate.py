"""An estimate, from a graph alone, of what autograd saves of a stretch of it."""

from typing import Any

from torch.fx import Node

from attnres_fx.passes.graph.example_sizes import example_size
from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, moves_data


def saved_activations_between(first: Node, last: Node) -> float:
    """What autograd saves between two reads: the inputs of contractions and nonlinear functions, each once.

    What can be computed again from less is counted as well, so this is what eager autograd saves rather than what a
    min-cut partitioner would; weights are not counted.

    Returns:
        Bytes, as a multiple of those of the first read.
    """
    saved: set[Node] = set()
    node = first.next
    while node is not last and node.op not in ("root", "output"):
        if has_trait(node, Trait.SAVES_INPUTS) or node.op == "call_module":
            saved |= {_before_views(n) for n in node.all_input_nodes}
        node = node.next
    size = _size(first)
    return sum(_size(n) for n in saved if n.op not in ("get_attr", "placeholder")) / size if size else 0.0


def _before_views(node: Node) -> Node:
    """The node whose data this one is a view or a copy of."""
    while moves_data(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _size(node: Node) -> float:
    """Bytes of a floating value; 0 for every other."""
    value = tensor_of(node)
    if value is None or not value.is_floating_point():
        return 0.0
    total = float(value.element_size())
    for size in value.shape:
        total *= _number(size)
    return total


def _number(size: Any) -> float:
    """A size, or what the example had where it is free."""
    known = example_size(size)
    return 1.0 if known is None else float(known)
