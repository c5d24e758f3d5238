"""An estimate, from a graph alone, of what autograd keeps of a stretch of it."""

from typing import Any

import torch
from torch.fx import Node

from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, moves_data


def kept_between(first: Node, last: Node) -> float:
    """Sizes of what contractions and nonlinear functions between two reads take in, each once, in sizes of a read.

    What can be computed again from less is counted as well, so this is what eager autograd keeps rather than what a
    min-cut partitioner would; weights are not counted.
    """
    kept: set[Node] = set()
    node = first.next
    while node is not last and node.op not in ("root", "output"):
        if has_trait(node, Trait.SAVES_INPUTS) or node.op == "call_module":
            kept |= {_held(n) for n in node.all_input_nodes}
        node = node.next
    size = _size(first)
    return sum(_size(n) for n in kept if n.op not in ("get_attr", "placeholder")) / size if size else 0.0


def _held(node: Node) -> Node:
    while moves_data(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _size(node: Node) -> float:
    value = tensor_of(node)
    if value is None or not value.is_floating_point():
        return 0.0
    total = float(value.element_size())
    for size in value.shape:
        total *= _number(size)
    return total


def _number(size: Any) -> float:
    """A size, or what the example had where it is free."""
    if isinstance(size, torch.SymInt):
        hint = getattr(size.node, "hint", None)
        return float(hint) if isinstance(hint, int) else 1.0
    return float(size)
