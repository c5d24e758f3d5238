"""Writes to some rows of a storage, as values of all of it.

Before:
    h[:, 1:] += f
After:
    rows = h[:, 1:] + f
    h1 = torch.slice_scatter(h, rows, 1, 1, None)
"""

import operator
from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import is_floating, tensor_of
from attnres_fx.passes.graph.operations import op_name
from attnres_fx.passes.graph.pieces import Piece, piece_of
from attnres_fx.passes.normalize.functional_form import shows_all


def may_put_back(view: Node, parents: Mapping[Node, Node]) -> bool:
    """Whether what a view holds can be put back into its storage: each view on the way shows all, or a run of rows."""
    while view in parents:
        if not shows_all(view, parents[view]) and _place(piece_of(view)) is None:
            return False
        view = parents[view]
    return is_floating(view)


def put_back(view: Node, whole: Node, rows: Node, like: Node) -> Node:
    """A tensor with other rows in the place of a view of it.

    Args:
        view: The view; it says where the rows are.
        whole: The tensor.
        rows: What the rows are from now on.
        like: The write it stands for.
    """
    piece = piece_of(view)
    place = _place(piece)
    assert piece is not None and place is not None
    name = "select_scatter" if piece.dropped else "slice_scatter"
    return emit(whole.graph, name, (whole, rows, piece.dim, *place), like=like, dialect=view)


def _place(piece: Piece | None) -> tuple[Any, ...] | None:
    if piece is None:
        return None
    known = isinstance(piece.start, int) and isinstance(piece.size, int)
    if piece.dropped:
        return (piece.start,) if known else None
    return (piece.start, piece.start + piece.size) if known else piece.bounds


def picks_by_tensor(node: Node) -> Node | None:
    """The index of `x[index] = value` with one tensor for the first dimension."""
    index = node.args[1] if node.target is operator.setitem else None
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(parts[0], Node) or tensor_of(parts[0]) is None:
        return None
    return parts[0] if all(p == slice(None) for p in parts[1:]) else None


def is_same_view(a: Node, b: Node, parents: Mapping[Node, Node]) -> bool:
    """Whether two nodes take the same view of one tensor."""
    if a is b:
        return True
    same = op_name(a) == op_name(b) and a.args[1:] == b.args[1:] and a.kwargs == b.kwargs
    return same and a in parents and parents[a] is parents.get(b)
