"""Operations that map a state row by row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from attnres_fx.passes.graph.additions import added_zero_operand, adds_zero, is_zero
from attnres_fx.passes.graph.nodes import argument_of, is_floating, same_row_sizes, same_shape, shape_of, tensor_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import (
    dropout_probability,
    has_trait,
    indexed_dimensions,
    is_dropout,
    op_name,
    stops_gradient,
    turned_by,
)
from attnres_fx.passes.graph.pieces import JOIN_NAMES, join_of

#: Whether a node keeps the rows of another whole, where they are not in the last dimension; None where they are.
KeepsRows = Callable[[Node, Node], bool | None]


def in_last_dimension(before: Node, after: Node) -> None:
    """Every tensor has its rows in the last dimension."""


@dataclass(frozen=True)
class RowMap:
    """A node that maps over every source of the state it is given.

    Args:
        state: What is mapped.
        kind: `"identity"`, `"detach"` (no gradient), `"cast"`, `"reshape"` (rows in the same order), `"token"` (rows
            moved or picked) or `"factor"` (rows multiplied).
        others: The nodes that a factor comes from.
    """

    state: Node
    kind: str
    others: tuple[Node, ...] = ()


def match_row_maps(node: Node, keeps_rows: KeepsRows = in_last_dimension) -> tuple[RowMap, ...]:
    """The ways in which a node can be a row map.

    Args:
        node: Any node of a graph with values on its nodes.
        keeps_rows: Says of rows that are not in the last dimension whether they are kept.

    Returns:
        A row map for each argument that the node maps row by row: two for a product of two tensors.
    """
    if not is_floating(node):
        return ()
    name = op_name(node)
    if name in ("mul", "div"):
        return _products(node, name)
    first = _mapped_operand(node, name)
    if not isinstance(first, Node) or not is_floating(first):
        return ()
    kind = _kind_of_map(node, name, first, keeps_rows)
    others = tuple(n for n in node.all_input_nodes if n is not first) if kind == "factor" else ()
    return (RowMap(first, kind, others),) if kind else ()


def _mapped_operand(node: Node, name: str) -> Any:
    """The operand that a node, no product, would map row by row."""
    if name == "where" and len(node.args) == 3:
        kept = [n for n, other in (node.args[1:], node.args[:0:-1]) if is_of_zeros(other)]
        return kept[0] if len(kept) == 1 else None
    if name in JOIN_NAMES:
        return _joined_with_zeros(node)
    return added_zero_operand(node) or (node.args[0] if node.args else node.kwargs.get("input"))


def _kind_of_map(node: Node, name: str, first: Node, keeps_rows: KeepsRows) -> str | None:
    if stops_gradient(node):
        return "detach"
    if is_dropout(node):
        return "identity" if dropout_probability(node) == 0 else None
    if _is_identity(node, name):
        return "identity"
    if has_trait(node, Trait.CAST):
        return "cast"
    if name in _WRITES and _writes_zeros(node, *_WRITES[name]):
        return None if keeps_rows(first, node) is False else "factor"
    if name in ("neg", "where") or (name == "masked_fill" and is_zero(argument_of(node, 2, "value"))):
        return "factor" if same_shape(node, first) else None
    return _kind_of_move(node, name, first, keeps_rows)


def _kind_of_move(node: Node, name: str, first: Node, keeps_rows: KeepsRows) -> str | None:
    """How a node that moves data maps rows; None of every other node."""
    if name == "pad" and not _pads_with_zeros(node):
        return None
    if not (has_trait(node, _MOVES) or name in _GATHERS or turned_by(node)):
        return None
    kept = keeps_rows(first, node)
    if has_trait(node, Trait.RESHAPE):
        return "reshape" if (same_row_sizes(first, node) if kept is None else kept) else None
    if name in _GATHERS:
        return "token" if kept is None and _gathers_whole_rows(node, first) else None
    return "token" if (_moves_whole_rows(node, name, first) if kept is None else kept) else None


_MOVES = Trait.RESHAPE | Trait.TOKEN_MOVE | Trait.PICKS | Trait.MORE_ROWS
_ZEROS = ("zeros_like", "zeros", "new_zeros")
#: Where an operation takes what it writes into some rows.
_WRITES = {
    "slice_scatter": (1, "src"),
    "select_scatter": (1, "src"),
    "index_copy": (3, "source"),
    "index_put": (2, "values"),
    "scatter": (3, "src"),
}


def _writes_zeros(node: Node, position: int, name: str) -> bool:
    """Whether what is written into some rows of a tensor is zero: those rows are multiplied by it."""
    written = argument_of(node, position, name)
    return isinstance(written, Node) and is_of_zeros(written)


def is_of_zeros(value: Any) -> bool:
    """Whether an argument is the number zero, or a tensor that was made of zeros and that nothing writes to."""
    return op_name(value) in _ZEROS if isinstance(value, Node) else is_zero(value)


def adds_rows(node: Node) -> bool:
    """Whether a row map makes more rows than it is given: zeros beside them, or copies that lie in memory."""
    return has_trait(node, Trait.MORE_ROWS)


def written_dimension(node: Node) -> int | None:
    """The dimension along which a node writes into another tensor, or puts one beside others.

    None of other nodes, and where there are several.
    """
    name = op_name(node)
    if name in JOIN_NAMES and (join := join_of(node)) is not None:
        return join.dim
    if name not in _WRITES or name == "index_put":
        return None
    dim = argument_of(node, 2 if name.endswith("_scatter") else 1, "dim") or 0
    return dim % len(shape_of(node)) if isinstance(dim, int) else None


def _is_identity(node: Node, name: str) -> bool:
    return has_trait(node, Trait.IDENTITY) or (name in ("add", "sub") and adds_zero(node))


def _products(node: Node, name: str) -> tuple[RowMap, ...]:
    left = node.args[0] if node.args else node.kwargs.get("input")
    right = argument_of(node, 1, "other")
    if name == "div" and node.kwargs.get("rounding_mode") is not None:
        return ()
    pairs = [(left, right)] if name == "div" else [(left, right), (right, left)]
    return tuple(
        RowMap(state, "factor", (other,) if isinstance(other, Node) else ())
        for state, other in pairs
        if isinstance(state, Node) and is_floating(state) and same_shape(state, node) and state is not other
    )


def _joined_with_zeros(node: Node) -> Node | None:
    """The only part of a join that is not made of zeros: its rows stand there as they were."""
    join = join_of(node)
    parts = [] if join is None or join.stacked else [p for p in join.parts if not is_of_zeros(p)]
    return parts[0] if len(parts) == 1 and len(shape_of(parts[0])) == len(shape_of(node)) else None


def _pads_with_zeros(node: Node) -> bool:
    """Whether a pad puts zeros around rows."""
    given = [*node.args[2:], *(node.kwargs[k] for k in ("mode", "value") if k in node.kwargs)]
    return all(g is None or g == "constant" or is_zero(g) for g in given)


def _moves_whole_rows(node: Node, name: str, first: Node) -> bool:
    before, after = shape_of(first), shape_of(node)
    if not after or not same_row_sizes(first, node):
        return False
    rank = len(before)
    if name == "pad":
        amounts = argument_of(node, 1, "pad")
        return isinstance(amounts, list | tuple) and all(map(is_zero, amounts[:2]))
    if name in JOIN_NAMES:
        return written_dimension(node) != rank - 1
    if name in ("repeat", "tile"):
        return _repeats_whole_rows(node)
    if name in ("getitem", "index"):
        return _leaves_last_alone(node.args[1], rank)
    if name in ("expand", "expand_as", "broadcast_to"):
        return True
    if name == "t":
        return False
    return not any(d % rank == rank - 1 for d in _dimensions(node, name, rank))


#: Where an operation that gathers has its dimension and its index.
_GATHERS = {"gather": ((1, "dim"), (2, "index")), "take_along_dim": ((2, "dim"), (1, "indices"))}


def _gathers_whole_rows(node: Node, first: Node) -> bool:
    """Whether the index of a gather is the same for all features of a row."""
    at, which = _GATHERS[op_name(node)]
    dim, index = argument_of(node, *at), argument_of(node, *which)
    rank = len(shape_of(first))
    if not isinstance(dim, int) or not isinstance(index, Node) or dim % rank == rank - 1:
        return False
    picked = tensor_of(index)
    if op_name(index) == "repeat" and shape_of(index.all_input_nodes[0])[-1:] == (1,):
        picked = tensor_of(index.all_input_nodes[0])
    if picked is None or picked.dim() != rank or not same_row_sizes(first, node):
        return False
    return bool(picked.shape[-1] == 1 or picked.stride(-1) == 0)  # an index that is expanded has one number a row


def _repeats_whole_rows(node: Node) -> bool:
    """Whether a repeat leaves the features as they are."""
    times = argument_of(node, 1, "dims" if op_name(node) == "tile" else "repeats")
    times = times if isinstance(times, list | tuple) else node.args[1:]
    return bool(times and times[-1] == 1)


def _dimensions(node: Node, name: str, rank: int) -> list[int]:
    """Dimensions a token move touches; the last one among them means that rows are not kept whole."""
    if name == "permute":
        return _permuted(node, rank)
    if name in ("transpose", "movedim"):
        pair = (argument_of(node, 1, "dim0"), argument_of(node, 2, "dim1"))
        return [d for value in pair for d in _known_dimensions(value, rank)]
    return _known_dimensions(_named_dimensions(node, name, rank), rank) or [rank - 1]


def _permuted(node: Node, rank: int) -> list[int]:
    """The dimensions that a permutation puts elsewhere."""
    dims = argument_of(node, 1, "dims")
    dims = list(dims) if isinstance(dims, list | tuple) else [d for d in node.args[1:] if isinstance(d, int)]
    return [i for i, d in enumerate(dims) if isinstance(d, int) and d % rank != i]


def _named_dimensions(node: Node, name: str, rank: int) -> Any:
    """What a call says of its dimensions, or what the operation takes where the call says nothing."""
    if name == "roll":
        return argument_of(node, 2, "dims")
    dims = argument_of(node, 2 if name == "repeat_interleave" else 1, "dims" if name == "flip" else "dim")
    if dims is not None:
        return dims
    return 0 if name in ("slice", "select", "narrow") else rank - 1


def _known_dimensions(dims: Any, rank: int) -> list[int]:
    """Dimensions as a list; one that is not known counts as the last."""
    listed = list(dims) if isinstance(dims, list | tuple) else [dims]
    return [d if isinstance(d, int) else rank - 1 for d in listed]


def _leaves_last_alone(index: Any, rank: int) -> bool:
    parts = index if isinstance(index, tuple | list) else (index,)
    taken = sum(indexed_dimensions(p) for p in parts)
    if Ellipsis not in parts and taken < rank:
        return True
    return bool(parts) and (parts[-1] is Ellipsis or parts[-1] == slice(None))
