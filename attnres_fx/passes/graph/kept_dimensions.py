"""Which dimensions of a tensor an operation keeps as they are: one index before, the same index after."""

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from attnres_fx.passes.graph.nodes import argument_of, is_floating, shape_of, shapes_agree, sizes_agree, value_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import (
    asks_only_metadata,
    has_trait,
    indexed_dimensions,
    is_light,
    op_name,
    picks_rows,
    turned_by,
)

#: A tensor, one of its dimensions, and where that dimension is in the result.
Kept = tuple[Node, int, int]


def kept_dimensions(node: Node) -> Iterator[Kept]:
    """The dimensions that a node keeps of what it takes, entry for entry.

    Pointwise work, norms and casts keep all of them; a permutation keeps them elsewhere; a reshape keeps those that it
    neither splits nor joins, a slice or a `cat` those that it does not touch. Contractions and reductions keep none
    here, and neither does what is spread over the result: a mask or a bias says nothing of what it meets.

    Args:
        node: Any node of a graph with values on its nodes.
    """
    if not is_floating(node):
        return
    name = op_name(node)
    if picks_rows(node):
        yield from _of_picked_rows(node)
    elif name == "getitem":
        yield from _of_item(node)
    elif turn := turned_by(node):
        yield from _of_permutation(node, turn)
    elif has_trait(node, Trait.RESHAPE):
        yield from _of_reshape(node)
    elif name in ("cat", "concat", "concatenate"):
        yield from _of_joined(node)
    elif has_trait(node, Trait.TOKEN_MOVE | Trait.MORE_ROWS):
        yield from _of_picked(node, name)
    elif has_trait(node, Trait.NORM):
        yield from _where_shapes_agree(node, node.all_input_nodes[:1])
    elif is_light(node):
        yield from _where_shapes_agree(node, node.all_input_nodes)


def _where_shapes_agree(node: Node, sources: list[Node]) -> Iterator[Kept]:
    shape = shape_of(node)
    for source in sources:
        if is_floating(source) and shapes_agree(shape_of(source), shape) and not asks_only_metadata(node, source):
            yield from ((source, i, i) for i in range(len(shape)))


def _of_item(node: Node) -> Iterator[Kept]:
    """A slice of a tensor, or an output of what splits or norms one."""
    source, index = node.args[:2]
    if not isinstance(source, Node):
        return
    if is_floating(source):
        yield from _of_index(node, source, index)
        return
    made_from = source.all_input_nodes[:1] if isinstance(value_of(source), tuple | list) else []
    if made_from and is_floating(made_from[0]) and (is_light(source) or (index == 0 and has_trait(source, Trait.NORM))):
        yield from _in_place(node, made_from[0], ())


def _of_index(node: Node, source: Node, index: Any) -> Iterator[Kept]:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(not (p is None or p is Ellipsis or isinstance(p, int | slice)) for p in parts):
        return
    before, after = shape_of(source), shape_of(node)
    taken = sum(p is not None and p is not Ellipsis for p in parts)
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    at, to = 0, 0
    for part in parts:
        if part is None:
            to += 1
        elif isinstance(part, int):
            at += 1
        else:
            for _ in range(len(before) - taken if part is Ellipsis else 1):
                if sizes_agree(before[at], after[to]):
                    yield source, at, to
                at, to = at + 1, to + 1


def _of_picked_rows(node: Node) -> Iterator[Kept]:
    """What stands behind the last dimension that is indexed."""
    source, index = node.args[:2]
    if not isinstance(source, Node) or not is_floating(source):
        return
    parts = list(index) if isinstance(index, tuple | list) else [index]
    rank = len(shape_of(source))
    at = 0
    last = -1
    for part in parts:
        taken = rank - sum(map(indexed_dimensions, parts)) if part is Ellipsis else indexed_dimensions(part)
        if isinstance(part, Node | int | list):
            last = at + taken - 1
        elif isinstance(part, slice) and part != slice(None):
            last = max(last, at)
        at += taken
    yield from _in_place(node, source, tuple(range(last + 1)))


def _of_permutation(node: Node, name: str) -> Iterator[Kept]:
    source = _first(node)
    if source is None:
        return
    rank = len(shape_of(source))
    order = _order(node, name, rank)
    if sorted(order) == list(range(rank)):
        yield from ((source, before, after) for after, before in enumerate(order))


def _order(node: Node, name: str, rank: int) -> list[int]:
    """Which dimension of the source stands at each place of the result; empty where it cannot be read."""
    if name in ("t", "T"):
        return list(range(rank))[::-1]
    if name == "mT":
        return [*range(rank - 2), rank - 1, rank - 2]
    first, second = argument_of(node, 1, "dims" if name == "permute" else "dim0"), argument_of(node, 2, "dim1")
    if name == "permute":
        dims = first if isinstance(first, list | tuple) else node.args[1:]
        return [d % rank for d in dims if isinstance(d, int)]
    if name == "movedim":
        first, second = argument_of(node, 1, "source"), argument_of(node, 2, "destination")
    if not isinstance(first, int) or not isinstance(second, int):
        return []
    order, first, second = list(range(rank)), first % rank, second % rank
    if name == "movedim":
        order.insert(second, order.pop(first))
    else:
        order[first], order[second] = order[second], order[first]
    return order


def _of_reshape(node: Node) -> Iterator[Kept]:
    """A dimension is kept where its size is, and the product of the sizes on one side of it."""
    source = _first(node)
    if source is None:
        return
    before, after = shape_of(source), shape_of(node)
    left = _products(before), _products(after)
    right = _products(before[::-1])[::-1], _products(after[::-1])[::-1]
    for i, size in enumerate(before):
        for j, other in enumerate(after):
            if not sizes_agree(size, other) or (isinstance(size, int) and size == 1):
                continue
            if _same(right[0][i], right[1][j]) or _same(left[0][i], left[1][j]):
                yield source, i, j


def _products(shape: tuple[Any, ...]) -> list[Any]:
    """Of each dimension, the product of the sizes before it."""
    found: list[Any] = [1]
    for size in shape[:-1]:
        found.append(found[-1] * size)
    return found


def _same(x: Any, y: Any) -> bool:
    return x is y or sizes_agree(x, y)


def _of_joined(node: Node) -> Iterator[Kept]:
    dim = argument_of(node, 1, "dim")
    rank = len(shape_of(node))
    if dim is not None and not isinstance(dim, int):
        return
    for source in node.all_input_nodes:
        if is_floating(source):
            yield from _in_place(node, source, ((dim or 0) % rank,))


def _of_picked(node: Node, name: str) -> Iterator[Kept]:
    """Rows picked, moved, padded or repeated: the other dimensions stay, counted from the last."""
    source = _first(node)
    if source is None:
        return
    rank = len(shape_of(source))
    if name == "select":
        dim = argument_of(node, 1, "dim")
        if isinstance(dim, int):
            kept = [d for d in range(rank) if d != dim % rank]
            yield from ((source, before, after) for after, before in enumerate(kept))
        return
    touched = argument_of(node, 2 if name == "roll" else 1, "dims") if name in ("roll", "flip") else ()
    if name in ("index_select", "repeat_interleave"):
        touched = argument_of(node, 1 if name == "index_select" else 2, "dim")
    listed = list(touched) if isinstance(touched, list | tuple) else [touched]
    if all(isinstance(d, int) for d in listed):
        yield from _in_place(node, source, tuple(d % rank for d in listed))


def _in_place(node: Node, source: Node, touched: tuple[int, ...]) -> Iterator[Kept]:
    """Dimensions that stand where they stood, counted from the last, with the size they had."""
    before, after = shape_of(source), shape_of(node)
    for i in range(1, min(len(before), len(after)) + 1):
        at = len(before) - i
        if at not in touched and sizes_agree(before[-i], after[-i]):
            yield source, at, len(after) - i


def _first(node: Node) -> Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, Node) and is_floating(source) else None
