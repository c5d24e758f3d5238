"""Rows that are written into a tensor, as an addition to it.

Before:
    h1 = torch.slice_scatter(h, h[:, 1:] + f, 1, 1)     # f was computed from h
    h2 = h1.index_copy(0, i, g)
After:
    h1 = h + torch.slice_scatter(torch.zeros_like(h), f, 1, 1)
    h2 = h1.index_copy(0, i, torch.zeros_like(g)) + torch.zeros_like(h1).index_copy(0, i, g)

Rows that are not written to are what they were, to the bit. Who takes in the new rows before they are written takes
them from the sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import argument_of, copy_call, is_floating, same_shape, shape_of, sizes_agree
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name
from attnres_fx.passes.graph.pieces import pieces_of
from attnres_fx.passes.graph.result import PassResult, replacing
from attnres_fx.passes.normalize.row_parts import may_be_written, summands

#: Where an operation takes what it writes, and what picks the rows that it writes to.
_WRITES = {
    "slice_scatter": (1, "src", ()),
    "select_scatter": (1, "src", ()),
    "index_copy": (3, "source", ("index_select", "getitem", "index")),
    "index_put": (2, "values", ("getitem", "index")),
    "scatter": (3, "src", ("gather",)),
}


def unfold_row_writes_pass(gm: GraphModule) -> PassResult:
    """Write, in place, what writes rows into a running sum as an addition to the sum.

    Args:
        gm: A module with values on the nodes of its graph, without mutations.

    Returns:
        The module, and the names of the writes that are no longer there.
    """
    return replacing(gm, _unfolded_write)


def _unfolded_write(node: Node) -> Node | None:
    _take_rows_as_picked_(node)
    write = _write_of(node)
    return None if write is None else _unfolded(write)


@dataclass(frozen=True)
class _Write:
    """A call that writes rows into a copy of a tensor.

    Args:
        node: The call.
        whole: The tensor.
        rows: What is written.
        accumulates: Whether it is added to what stands there.
    """

    node: Node
    whole: Node
    rows: Node
    accumulates: bool = False


@dataclass(frozen=True)
class _Sum:
    """An addition to rows: the node, what is added, its scale, and what it is added to."""

    node: Node
    addend: Node
    scale: float
    below: Node


def _take_rows_as_picked_(node: Node) -> None:
    """Let an `index_put` take its rows without the view that an export drops their leading ones with: they spread."""
    rows = argument_of(node, 2, "values") if op_name(node) == "index_put" else None
    if not isinstance(rows, Node) or not has_trait(rows, Trait.RESHAPE) or not isinstance(rows.args[0], Node):
        return
    whole, stripped = shape_of(rows.args[0]), shape_of(rows)
    extra = len(whole) - len(stripped)
    if extra > 0 and whole[:extra] == (1,) * extra and all(map(sizes_agree, whole[extra:], stripped)):
        node.replace_input_with(rows, rows.args[0])
        if not rows.users:
            rows.graph.erase_node(rows)


def _write_of(node: Node) -> _Write | None:
    known = _WRITES.get(op_name(node))
    if known is None or not is_floating(node) or not node.args or node.kwargs.get("reduce") is not None:
        return None
    whole, rows = node.args[0], argument_of(node, known[0], known[1])
    if not isinstance(whole, Node) or not isinstance(rows, Node) or not is_floating(rows):
        return None
    if whole is rows or op_name(rows) == "zeros_like" or op_name(whole) == "zeros_like":
        return None
    return _Write(node, whole, rows, argument_of(node, 3, "accumulate") is True and op_name(node) == "index_put")


def _unfolded(write: _Write) -> Node | None:
    if write.accumulates:
        return _added(write, [(write.rows, 1)]) if may_be_written([write.rows], write.whole) else None
    found = _sums_onto(write.rows, lambda n: _is_rows_of(n, write))
    if found is None:
        return _in_place_of_rows(write)
    sums, pick = found
    if not sums or not may_be_written([s.addend for s in sums], write.whole):
        return None
    chain = {s.node for s in sums} | {write.node}
    readers = {s.node: [u for u in s.node.users if u not in chain] for s in sums}
    if any(readers.values()):
        return _sum_by_sum(write, sums, pick, readers)
    return _added(write, [(_shaped(s, write), s.scale) for s in sums])


def _added(write: _Write, addends: list[tuple[Node, float]]) -> Node:
    total = write.whole
    with write.node.graph.inserting_before(write.node):
        for addend, scale in addends:
            total = _plus(write, total, addend, scale)
    return total


def _shaped(part: _Sum, write: _Write) -> Node:
    if same_shape(part.addend, part.node):
        return part.addend
    with part.node.graph.inserting_before(part.node):
        return emit(part.node.graph, "expand_as", (part.addend, part.below), like=part.addend, dialect=write.node)


def _plus(write: _Write, total: Node, addend: Node, scale: float) -> Node:
    graph = write.node.graph
    zeros = emit(graph, "zeros_like", (write.whole,), like=write.node)
    spread = copy_call(write.node, {write.whole: zeros, write.rows: addend})
    added = emit(graph, "add", (total, spread), like=write.node)
    if scale != 1:
        added.kwargs = {"alpha": scale}
    return added


def _in_place_of_rows(write: _Write) -> Node | None:
    """Other rows: the tensor with zeros there, and what stands there now."""
    if not may_be_written([write.rows], write.whole) or _writes_features(write):
        return None
    graph = write.node.graph
    with graph.inserting_before(write.node):
        nothing = emit(graph, "zeros_like", (write.rows,), like=write.rows, dialect=write.node)
        kept = copy_call(write.node, {write.rows: nothing})
        return _plus(write, kept, write.rows, 1)


def _writes_features(write: _Write) -> bool:
    if op_name(write.node) == "index_put":
        return False
    rank, position = len(shape_of(write.whole)), 2 if op_name(write.node).endswith("_scatter") else 1
    dim = argument_of(write.node, position, "dim")
    return not isinstance(dim or 0, int) or (dim or 0) % rank == rank - 1


def _sum_by_sum(write: _Write, sums: list[_Sum], pick: Node, readers: dict[Node, list[Node]]) -> Node | None:
    """Each sum is one of the whole, and who reads the rows in between takes them from it."""
    others = [n for n in write.node.all_input_nodes if n is not write.rows]
    if any(n >= sums[0].node for n in others) or not isinstance(pick.args[0], Node):
        return None
    total = write.whole
    for part in sums:
        addend = _shaped(part, write)
        with write.node.graph.inserting_before(part.node):
            total = _plus(write, total, addend, part.scale)
            seen = copy_call(pick, {pick.args[0]: total})
        for user in readers[part.node]:
            user.replace_input_with(part.node, seen)
    return total


def _sums_onto(rows: Node, is_pick: Callable[[Node], bool]) -> tuple[list[_Sum], Node] | None:
    """The additions that lead from picked rows to a node, the first one first, and the rows; None where none do."""
    above: dict[Node, _Sum | Node | None] = {rows: None}
    stack = [rows]
    while stack:
        node = stack.pop()
        if is_pick(node):
            return _way_up(node, above), node
        for operand, addend, scale in summands(node):
            if operand not in above and (addend is None or same_shape(operand, node)):
                above[operand] = node if addend is None else _Sum(node, addend, scale, operand)
                stack.append(operand)
    return None


def _way_up(node: Node, above: dict[Node, _Sum | Node | None]) -> list[_Sum]:
    found = []
    while (step := above[node]) is not None:
        if isinstance(step, _Sum):
            found.append(step)
            node = step.node
        else:
            node = step
    return found


def _is_rows_of(node: Node, write: _Write) -> bool:
    """Whether a node is the rows of the tensor that a write goes to."""
    if not is_floating(node) or not node.args or not isinstance(node.args[0], Node):
        return False
    name, args = op_name(write.node), write.node.args
    if name in ("slice_scatter", "select_scatter"):
        return _is_piece_written(node, write)
    if op_name(node) not in _WRITES[name][2] or _unchanged(node.args[0]) is not _unchanged(write.whole):
        return False
    if op_name(node) in ("index_select", "gather"):
        return node.args[1] == args[1] and _are_same(node.args[2], args[2])
    picked = node.args[1]
    picked = list(picked) if isinstance(picked, list | tuple) else [picked]
    if name == "index_put":
        written = list(args[1]) if isinstance(args[1], list | tuple) else []
        return len(picked) == len(written) > 0 and all(map(_are_same, picked, written))
    return bool(args[1] == 0 and len(picked) == 1 and _are_same(picked[0], args[2]))


def _are_same(index: Any, other: Any) -> bool:
    """Whether two indices are one: a tracer may take the same attribute twice."""
    if isinstance(index, Node) and isinstance(other, Node) and index.op == other.op == "get_attr":
        return index.target == other.target
    return bool(index == other)


def _is_piece_written(node: Node, write: _Write) -> bool:
    dim = argument_of(write.node, 2, "dim") or 0
    rank = len(shape_of(write.whole))
    first = argument_of(write.node, 3, "start" if op_name(write.node) == "slice_scatter" else "index") or 0
    for piece in pieces_of(node):
        if _unchanged(piece.source) is _unchanged(write.whole) and piece.dim == dim % rank:
            begins = piece.bounds[0] if piece.bounds is not None else piece.start
            counted = first + shape_of(write.whole)[piece.dim] if isinstance(first, int) and first < 0 else first
            same = begins is first or (not isinstance(counted, Node) and sizes_agree(piece.start, counted))
            return bool(same) and piece.dropped == (op_name(write.node) == "select_scatter")
    return False


def _unchanged(node: Node) -> Node:
    """What a tensor is a copy of."""
    while has_trait(node, Trait.IDENTITY) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
