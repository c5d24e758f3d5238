"""Which part of which tensor a node is, and what a node puts together from parts, in every spelling of the two."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from attnres_fx.passes.graph.nodes import argument_of, is_floating, same_shape, shape_of, sizes_agree, value_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name

_SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk")
_JOINS = {"cat": None, "concat": None, "concatenate": None, "stack": None, "hstack": 1, "vstack": 0}


JOIN_NAMES = frozenset(_JOINS)


@dataclass(frozen=True)
class Piece:
    """A run of rows of a tensor along one dimension.

    Args:
        node: The node that is the piece.
        source: What it is a piece of.
        dim: The dimension.
        start: Where it begins, a number or a symbol.
        size: How long it is.
        dropped: Whether the dimension is gone, in a piece of length 1.
        bounds: Where a slice begins and ends, as its call says it.
    """

    node: Node
    source: Node
    dim: int
    start: Any
    size: Any
    dropped: bool = False
    bounds: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Join:
    """A tensor put together from parts along one dimension.

    Args:
        parts: The parts.
        dim: The dimension of the result.
        stacked: Whether the parts lack it.
    """

    parts: tuple[Node, ...]
    dim: int
    stacked: bool


def join_of(node: Node) -> Join | None:
    """The parts of `cat`, `stack` and their relatives; None of any other node, or where it is not known."""
    name = op_name(node)
    if name not in _JOINS or not is_floating(node):
        return None
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim: Any = _JOINS[name] if _JOINS[name] is not None else argument_of(node, 1, "dim")
    dim = node.kwargs.get("axis", 0) if dim is None else dim
    rank = len(shape_of(node))
    if not isinstance(parts, list | tuple) or not isinstance(dim, int) or len(parts) < 2:
        return None
    if not all(isinstance(p, Node) and is_floating(p) for p in parts):
        return None
    stacked = name == "stack" or len(shape_of(parts[0])) < rank  # type: ignore[arg-type]
    if name == "hstack" and rank == 1:
        dim = 0
    return Join(tuple(parts), dim % rank, stacked)  # type: ignore[arg-type]


def pieces_of(node: Node) -> Iterator[Piece]:
    """What a node is a piece of: first of its own input, then of what that is a piece of along the same dimension."""
    start: Any = 0
    found: Piece | None = None
    while (step := _step(node)) is not None:
        if found is None:
            found = step
        elif found.dim != step.dim or step.dropped:
            return
        start = start + step.start
        found = Piece(found.node, step.source, found.dim, start, found.size, found.dropped)
        yield found
        node = step.source


def _step(node: Node) -> Piece | None:
    """What a node is a piece of, through what passes a piece on as it is."""
    last = node
    while (has_trait(node, Trait.IDENTITY) or _takes_all(node)) and isinstance(node.args[0], Node):
        node = node.args[0]
    piece = piece_of(node) or _with_dimension_again(node)
    return None if piece is None else Piece(last, piece.source, piece.dim, piece.start, piece.size, piece.dropped)


def _takes_all(node: Node) -> bool:
    named = op_name(node) in ("slice", "narrow") and len(node.args) > 0
    return named and isinstance(node.args[0], Node) and same_shape(node, node.args[0])


def piece_of(node: Node) -> Piece | None:
    """What a view of rows is a piece of; None of any other node."""
    name = op_name(node)
    if not node.args or not isinstance(node.args[0], Node) or not is_floating(node):
        return None
    source = node.args[0]
    if name == "getitem":
        return _split_part(node, source) if op_name(source) in _SPLITS else _indexed(node, source, node.args[1])
    dim: Any = argument_of(node, 1, "dim")
    dim = 0 if dim is None else dim
    rank = len(shape_of(source))
    if name not in ("slice", "narrow", "select") or not isinstance(dim, int) or not rank:
        return None
    first = argument_of(node, 2, {"select": "index"}.get(name, "start"))
    if name == "slice" and argument_of(node, 4, "step") not in (None, 1):
        return None
    piece = _piece(node, source, dim % rank, first, dropped=name == "select")
    return replace(piece, bounds=(first, argument_of(node, 3, "end"))) if name == "slice" else piece


def _piece(node: Node, source: Node, dim: int, first: Any, *, dropped: bool) -> Piece:
    start = value_of(first) if isinstance(first, Node) else first
    whole = shape_of(source)[dim]
    start = 0 if start is None else start
    if isinstance(start, int) and start < 0:
        start = start + whole
        start = max(start, 0) if isinstance(start, int) else start
    elif isinstance(start, int) and isinstance(whole, int):
        start = min(start, whole)
    return Piece(node, source, dim, start, 1 if dropped else shape_of(node)[dim], dropped)


def _indexed(node: Node, source: Node, index: Any) -> Piece | None:
    """`x[:, a:b]` and `x[:, i]`: one slice or one number among whole dimensions."""
    parts = list(index) if isinstance(index, tuple) else [index]
    rank = len(shape_of(source))
    if any(p is None for p in parts) or not rank or not is_floating(source):
        return None
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (rank - len(parts) + 1)
    picks = [(d, p) for d, p in enumerate(parts) if p != slice(None)]
    if len(picks) != 1:
        return None
    dim, pick = picks[0]
    if isinstance(pick, slice):
        piece = _piece(node, source, dim, pick.start, dropped=False)
        return replace(piece, bounds=(pick.start, pick.stop)) if pick.step in (None, 1) else None
    if isinstance(pick, int) and not isinstance(pick, bool):
        return _piece(node, source, dim, pick, dropped=True)
    return None


def _split_part(node: Node, split: Node) -> Piece | None:
    """One of the results of `split`, `chunk`, `unbind` and their relatives."""
    source, index, parts = split.args[0] if split.args else None, node.args[1], value_of(split)
    dropped = op_name(split) == "unbind"
    dim: Any = argument_of(split, 1 if dropped else 2, "dim")
    dim = 0 if dim is None else dim
    if not isinstance(source, Node) or not isinstance(index, int) or not isinstance(dim, int):
        return None
    if not isinstance(parts, list | tuple) or not shape_of(source):
        return None
    dim, index = dim % len(shape_of(source)), index % len(parts)
    if dropped:
        return Piece(node, source, dim, index, 1, True)
    start: Any = 0
    for part in parts[:index]:
        start = start + part.shape[dim]
    return Piece(node, source, dim, start, shape_of(node)[dim])


def _with_dimension_again(node: Node) -> Piece | None:
    """`x[:, i].unsqueeze(1)` and `x[:, i][:, None]`: the piece of length 1."""
    if not node.args or not isinstance(node.args[0], Node) or op_name(node) not in ("unsqueeze", "getitem"):
        return None
    inner = _step(node.args[0]) if is_floating(node) and is_floating(node.args[0]) else None
    if inner is None or not inner.dropped:
        return None
    before, after = shape_of(inner.source), shape_of(node)
    if len(before) != len(after) or after[inner.dim] != 1 or not _adds_only(node, inner.dim, len(after)):
        return None
    return Piece(node, inner.source, inner.dim, inner.start, 1)


def _adds_only(node: Node, dim: int, rank: int) -> bool:
    if op_name(node) == "unsqueeze":
        given: Any = argument_of(node, 1, "dim")
        return isinstance(given, int) and given % rank == dim
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    parts = list(index)
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (rank - len(parts) + 1)
    return [d for d, p in enumerate(parts) if p is None] == [dim] and all(p in (None, slice(None)) for p in parts)


def lie_side_by_side(pieces: list[Piece | None], sizes: list[Any]) -> bool:
    """Whether pieces lie in a tensor where a join puts them; None stands for a part that is no piece.

    Args:
        pieces: The pieces in the order of the join.
        sizes: How long every part is.
    """
    at: Any = 0
    for piece, size in zip(pieces, sizes, strict=True):
        if piece is not None and not (sizes_agree(piece.start, at) and sizes_agree(piece.size, size)):
            return False
        at = at + size
    return True


__all__ = ["JOIN_NAMES", "Join", "Piece", "join_of", "lie_side_by_side", "piece_of", "pieces_of"]
