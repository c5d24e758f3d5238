"""Reshapes across rows that are undone: what is added in between is added to the rows.

Before:
    flat = h.flatten(1)                 # [B, N * D]: no row of it is one of h
    y = (flat + f.flatten(1)).view_as(h)
After:
    y = h + f.flatten(1).reshape_as(h)

Stochastic depth over a subset of the batch is written like this. Reshapes that keep rows whole are left as they are.
"""

import torch
from torch.fx import GraphModule, Node

from attnres_fx.passes.graph.additions import Addition, match_addition
from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import copy_call, is_floating, same_row_sizes, same_shape, tensor_of, value_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait
from attnres_fx.passes.graph.result import PassResult, replacing


def undo_reshapes_pass(gm: GraphModule) -> PassResult:
    """Take out, in place, reshapes that break rows up and are undone, an addition in between or not.

    Args:
        gm: A module with values on the nodes of its graph, without mutations.

    Returns:
        The module, and the names of the calls that are no longer there.
    """
    return replacing(gm, lambda node: (_moved_out(node) or _undone(node)) if is_floating(node) else None)


def _undone(node: Node) -> Node | None:
    """What a reshape gives back, where rows were broken up in between."""
    if not has_trait(node, Trait.RESHAPE):
        return None
    whole = _below(node, node)
    if whole is None:
        return None
    with node.graph.inserting_before(node):
        copied = emit(node.graph, "clone", (whole,), like=node, value=value_of(node))
    copied.kwargs = {"memory_format": torch.contiguous_format}  # what is viewed next may need it
    return copied


def _moved_out(node: Node) -> Node | None:
    """An addition to a tensor whose rows are broken up, as an addition to the tensor, where somebody undoes that."""
    addition = match_addition(node)
    if addition is None:
        return None
    for a in (addition, addition.swapped):
        undoers = [u for u in node.users if has_trait(u, Trait.RESHAPE)]
        whole = _broken_up(a.left)
        if whole is not None and same_shape(a.right, node) and any(same_shape(u, whole) for u in undoers):
            return _added_before(node, a, whole)
    return None


def _broken_up(node: Node) -> Node | None:
    """What a node is a reshape of that keeps no row."""
    if not has_trait(node, Trait.RESHAPE) or not node.args or not isinstance(node.args[0], Node):
        return None
    whole = node.args[0]
    return None if same_row_sizes(whole, node) else whole


def _added_before(node: Node, a: Addition, whole: Node) -> Node:
    graph = node.graph
    with graph.inserting_before(node):
        addend = emit(graph, "reshape_as", (a.right, whole), like=a.right, dialect=node)
        kept = whole if a.left_scale == 1 else emit(graph, "mul", (whole, a.left_scale), like=node)
        total = emit(graph, "add", (kept, addend), like=node)
        if a.right_scale != 1:
            total.kwargs = {"alpha": a.right_scale}
        return copy_call(a.left, {whole: total}, value=value_of(node))


def _below(node: Node, shaped: Node) -> Node | None:
    """The first tensor under a chain of reshapes that has a node's shape and dtype, behind one that keeps no row."""
    broken = False
    while has_trait(node, Trait.RESHAPE | Trait.IDENTITY) and node.args and isinstance(node.args[0], Node):
        broken = broken or not same_row_sizes(node, shaped)
        node = node.args[0]
        if same_shape(node, shaped):
            held, wanted = tensor_of(node), tensor_of(shaped)
            same = held is not None and wanted is not None and held.dtype == wanted.dtype
            return node if broken and same else None
    return None
