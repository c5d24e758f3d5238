"""Copies of graphs."""

import copy
from typing import Any

import torch
from torch.fx import Graph, Node


def copy_graph(graph: Graph) -> Graph:
    """A copy of a graph that generates the same code: nodes, how inputs and outputs are packed, the tracer class.

    Args:
        graph: any `torch.fx.Graph`; it is left as it is.

    Returns:
        A graph without an owning module. The dictionaries in `node.meta` are new, what they hold is shared: the
        tensors that nodes carry as examples are not copied.
    """
    return copy.deepcopy(graph)


def on_device(graph: Graph, device: torch.device) -> Graph | None:
    """A copy of a graph whose factory calls make their tensors on another device.

    A trace writes the device of its example into `arange`, `full`, casts: moved weights need moved constants.

    Args:
        graph: Any graph; it is left as it is.
        device: Where the tensors are to be made.

    Returns:
        The copy; None where no call of the graph names another device.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device) and value != device:
            return device
        return value

    def changed(node: Node) -> bool:
        return any(v is not moved(v) for v in (*node.args, *node.kwargs.values()))

    if not any(changed(n) for n in graph.nodes):
        return None
    copied = copy_graph(graph)
    for node in copied.nodes:
        node.args = tuple(moved(a) for a in node.args)
        node.kwargs = {k: moved(v) for k, v in node.kwargs.items()}
    return copied
