"""Rows that come new into a running sum that is added to again, as an addition to it.

Before:
    h1 = torch.cat([c, h], 1)                 # h is a sum, and a branch of h1 is added to h1
    h2 = torch.where(mask, v, h)
After:
    h1 = torch.cat([torch.zeros_like(c), h], 1) + torch.cat([c, torch.zeros_like(h)], 1)
    h2 = torch.where(mask, torch.zeros_like(h), h) + torch.where(mask, v, torch.zeros_like(h))

Rows that stay are what they were, to the bit. A join that is only read (two streams before a joint attention, a token
before the last norm) stays a join.
"""

from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node

from attnres_fx.passes.graph.additions import is_zero, match_addition
from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import argument_of, copy_call, is_floating, same_shape, shape_of, tensor_of
from attnres_fx.passes.graph.operations import op_name
from attnres_fx.passes.graph.pieces import Join, join_of
from attnres_fx.passes.graph.result import PassResult, replacing
from attnres_fx.passes.graph.row_maps import is_of_zeros, match_row_maps
from attnres_fx.passes.normalize.dependences import dependence_on


def split_new_rows_pass(gm: GraphModule) -> PassResult:
    """Write, in place, what brings new rows into a running sum as an addition to the sum.

    Args:
        gm: A module with values on the nodes of its graph, without mutations.

    Returns:
        The module, and the names of the calls that are no longer there.
    """
    return replacing(gm, _split)


def _split(node: Node) -> Node | None:
    split = _SPLITS.get(op_name(node))
    if split is None or not is_floating(node):
        return None
    with node.graph.inserting_before(node):
        return split(node.graph, node)


def _split_cat(graph: Graph, node: Node) -> Node | None:
    join = join_of(node)
    state = None if join is None else _only_running_sum(join, node)
    if join is None or state is None:
        return None
    new_parts = [p for p in join.parts if p is not state]
    if all(map(is_of_zeros, new_parts)) or not _goes_on(node, state, new_parts):
        return None
    kept = [p if p is state else emit(graph, "zeros_like", (p,), like=p, dialect=node) for p in join.parts]
    new = [_zeros(graph, p, node) if p is state else p for p in join.parts]
    return _sum(
        graph,
        emit(graph, "cat", (kept, join.dim), like=node),
        emit(graph, "cat", (new, join.dim), like=new_parts[0], dialect=node),
        node,
    )


def _only_running_sum(join: Join, node: Node) -> Node | None:
    """The one running sum among the parts of a join of rows; None where there is not one."""
    if join.stacked or join.dim == len(shape_of(node)) - 1 or not all(_same_dtype(p, node) for p in join.parts):
        return None
    sums = [p for p in join.parts if _is_running_sum(p)]
    return sums[0] if len(sums) == 1 else None


def _split_where(graph: Graph, node: Node) -> Node | None:
    if len(node.args) != 3 or node.kwargs:
        return None
    mask, *sides = node.args
    sums = [i for i, s in enumerate(sides, 1) if isinstance(s, Node) and _is_running_sum(s)]
    if len(sums) != 1 or not isinstance(mask, Node) or getattr(tensor_of(mask), "dtype", None) != torch.bool:
        return None
    (place,) = sums
    state, value = node.args[place], node.args[3 - place]
    assert isinstance(state, Node)
    if not same_shape(state, node) or not _same_dtype(state, node) or is_of_zeros(value):
        return None
    if not _goes_on(node, state, [value] if isinstance(value, Node) else []) or dependence_on(mask, state):
        return None
    return _sum(graph, _with_zeros(node, 3 - place, state), _with_zeros(node, place, state), node)


def _split_masked_fill(graph: Graph, node: Node) -> Node | None:
    state, mask, value = (argument_of(node, i, n) for i, n in enumerate(("input", "mask", "value")))
    if not isinstance(state, Node) or not isinstance(mask, Node) or is_zero(value) or len(node.args) != 3:
        return None
    if not _is_running_sum(state) or not same_shape(state, node) or dependence_on(mask, state):
        return None
    if not _goes_on(node, state, [value] if isinstance(value, Node) else []):
        return None
    kept = copy_call(node, {})
    kept.args = (state, mask, 0)
    return _sum(graph, kept, _with_zeros(node, 0, state), node)


#: What puts rows beside those of a tensor, or in their place.
_SPLITS: dict[str, Callable[[Graph, Node], Node | None]] = {
    "cat": _split_cat,
    "concat": _split_cat,
    "concatenate": _split_cat,
    "where": _split_where,
    "masked_fill": _split_masked_fill,
}


def _with_zeros(node: Node, place: int, state: Node) -> Node:
    """A call with zeros in one place."""
    args = list(node.args)
    args[place] = _zeros(node.graph, state, node)
    copied = copy_call(node, {})
    copied.args = tuple(args)
    return copied


def _sum(graph: Graph, kept: Node, new: Node, node: Node) -> Node:
    return emit(graph, "add", (kept, new), like=node)


def _zeros(graph: Graph, state: Node, node: Node) -> Node:
    """Zeros in the shape of a state, made of what was added last: that is there where nobody needs the sum."""
    addition = match_addition(state)
    addends = [] if addition is None else [n for n in (addition.right, addition.left) if not _is_running_sum(n)]
    like = next((n for n in addends if same_shape(n, state) and _same_dtype(n, state)), state)
    return emit(graph, "zeros_like", (like,), like=state, dialect=node)


def _same_dtype(a: Node, b: Node) -> bool:
    left, right = tensor_of(a), tensor_of(b)
    return left is not None and right is not None and left.dtype == right.dtype


def _is_running_sum(node: Node) -> bool:
    """Whether a node is, as far as row maps go, a sum with a branch of what it is added to."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        addition = match_addition(current)
        below = [m.state for m in match_row_maps(current)]
        if addition is not None:
            below = [addition.left, addition.right]
            if any(_is_branch(a, b) for a, b in (below, below[::-1])):
                return True
        stack += [n for n in below if n not in seen]
        seen.update(below)
    return False


def _is_branch(addend: Node, of: Node) -> bool:
    """Whether a value was computed by more than elementwise work from another, or from what that is a row map of."""
    while True:
        if dependence_on(addend, of) == "branch":
            return True
        maps = match_row_maps(of)
        if not maps:
            return False
        of = maps[0].state


def _goes_on(node: Node, state: Node, new: list[Node]) -> bool:
    """Whether a branch of a node is added to it or to a row map of it, and what is new is no other form of a state."""
    if any(dependence_on(n, state) == "elementwise" for n in new):
        return False
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        for user in current.users:
            if user in seen:
                continue
            seen.add(user)
            addition = match_addition(user)
            if addition is not None:
                other = addition.right if addition.left is current else addition.left
                if dependence_on(other, node) == "branch":
                    return True
            elif any(m.state is current for m in match_row_maps(user)):
                stack.append(user)
    return False


__all__ = ["split_new_rows_pass"]
