"""Writing operations: one call, in the dialect of the graph it goes into."""

from typing import Any

import torch
from torch.fx import Graph, Node

from attnres_fx.passes.graph.nodes import computed_value, insert_call, tensor_of
from attnres_fx.passes.graph.operation_table import BY_NAME
from attnres_fx.passes.graph.operations import is_aten


def emit(
    graph: Graph, name: str, args: tuple[Any, ...], *, like: Node, value: Any = None, dialect: Node | None = None
) -> Node:
    """Insert an operation at the graph's insertion point.

    Args:
        graph: the graph to write into.
        name: canonical name of an operation that the table knows how to write.
        args: its arguments, nodes or numbers.
        like: the node whose metadata the new one gets.
        value: the value it has; by default computed from the values of its arguments.
        dialect: the node in whose dialect to write, where that is not `like`.
    """
    target = spelled(name, dialect or like)
    if value is None:
        value = computed_value("call_function", target, args, {})
    return insert_call(graph, target, args, like=like, value=value if value is not None else tensor_of(like))


def emit_switch(graph: Graph, name: str, args: tuple[Any, ...], *, like: Node) -> Node:
    """Insert, at the graph's insertion point, an operation that switches a mode or asks for it.

    Args:
        graph: The graph to write into.
        name: Canonical name of the operation.
        args: Its arguments.
        like: The node whose metadata the new one gets.

    Returns:
        The new node. It has no value: to compute one would switch the mode of this process.
    """
    target = BY_NAME[name].switch
    assert target is not None
    return insert_call(graph, target, args, like=like, value=None)


def spelled(name: str, like: Node) -> Any:
    """The target that means an operation in the dialect of a node: an aten overload or a torch function."""
    operation = BY_NAME[name]
    if is_aten(like):
        packet, overload = operation.aten.split(".")
        return getattr(getattr(torch.ops.aten, packet), overload)
    return operation.function
