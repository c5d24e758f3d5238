"""Rows that are taken apart and put together again: the same tensor, or an addition to some of its rows.

Before:
    a, b = h[:, :n], h[:, n:]
    h1 = torch.cat([a, b], 1)
    h2 = torch.cat([h1[:, :1], h1[:, 1:] + f], 1)     # f was computed from h1
    h3 = torch.cat([g, h2[:, 1:]], 1)
After:
    h1 = h.clone()
    h2 = h1 + torch.cat([torch.zeros_like(h1[:, :1]), f], 1)
    h3 = torch.slice_scatter(h2, torch.zeros_like(g), 1, 0, 1) + torch.cat([g, torch.zeros_like(h2[:, 1:])], 1)

Rows that nothing is added to are what they were, to the bit. Where somebody takes in the rows that were added to before
they are joined, he takes them from the sum. Features (the last dimension) are joined again, and never replaced: that is
how rotary embeddings are written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import insert_call, same_shape, shape_of, sizes_agree, tensor_of, value_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name
from attnres_fx.passes.graph.pieces import JOIN_NAMES, Join, Piece, join_of, lie_side_by_side, piece_of
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.normalize.row_parts import (
    Part,
    Parts,
    may_be_written,
    may_stand_before,
    piece_of_other,
    writes_branch,
)


def rejoin_rows_pass(gm: GraphModule) -> PassResult:
    """Write, in place, what joins pieces of one tensor as that tensor, or as an addition to it.

    Args:
        gm: A module with values on the nodes of its graph, without mutations.

    Returns:
        The module, and the names of the joins that are no longer there.
    """
    for node in gm.graph.nodes:
        _list_items_(node)
    joins = {n: j for n in gm.graph.nodes if (j := join_of(n)) is not None}
    if not joins:
        return PassResult(gm, False)
    removed = _Rejoiner(gm.graph, joins).run()
    if removed:
        gm.graph.lint()
    return PassResult(gm, bool(removed), (), tuple(removed))


@dataclass(frozen=True)
class _Match:
    """A join as pieces of one tensor, each with what was added to it; None for a part that is something else."""

    node: Node
    join: Join
    source: Node
    pieces: tuple[Piece | None, ...]
    sums: tuple[list[Part], ...]

    @property
    def is_identity(self) -> bool:
        return None not in self.pieces and not any(self.sums)

    @property
    def written(self) -> list[Node]:
        """What is added to rows, or stands in their place."""
        added = [s.addend for sums in self.sums for s in sums if s.addend is not None]
        return added + [p for p, piece in zip(self.join.parts, self.pieces, strict=True) if piece is None]


class _Rejoiner:
    """Walks through the joins in the order of the graph.

    Attributes:
        parts: What nodes are known to be pieces of; nodes before the one that the walk has come to.
    """

    def __init__(self, graph: Graph, joins: dict[Node, Join]) -> None:
        self.graph = graph
        self.joins = joins
        self.parts = Parts(graph)

    def run(self) -> list[str]:
        return [name for n in self.joins if (name := n.name) and self._replace(n)]

    def _replace(self, node: Node) -> bool:
        # What stands in the place of rows may be pieces too: the tensor that it was computed from goes first.
        matches = list(self._matches(node))
        if len(matches) > 1:
            matches.sort(key=lambda m: not m.is_identity and not writes_branch(m.written, m.source))
        total = next((t for m in matches if (t := self._rejoined(m)) is not None), None)
        if total is None:
            return False
        node.replace_all_uses_with(total)
        self.graph.erase_node(node)
        return True

    def _matches(self, node: Node) -> Iterator[_Match]:
        """A join as pieces of each tensor that it has pieces of."""
        join = _flat(node)
        if join is None:
            return
        parts = [self.parts.of(p) for p in join.parts]
        sources = dict.fromkeys(p.source for part in parts if part is not None for p in part.pieces)
        for source in sources:
            if not same_shape(source, node) or not _same_dtype(source, node):
                continue
            chosen = [self._piece_of(p, source, join) for p in parts]
            sizes = [1 if join.stacked else shape_of(p)[join.dim] for p in join.parts]
            if lie_side_by_side(chosen, sizes):
                pairs = zip(parts, chosen, strict=True)
                sums = tuple(p.sums() if p is not None and c is not None else [] for p, c in pairs)
                yield _Match(node, join, source, tuple(chosen), sums)

    def _piece_of(self, part: Part | None, source: Node, join: Join) -> Piece | None:
        """What a part is of a tensor, or of what takes the same view of the same tensor."""
        pieces = part.pieces if part is not None else ()
        fitting = (p for p in pieces if p.dim == join.dim and p.dropped == join.stacked)
        return next((p for p in fitting if self.parts.are_same(p.source, source)), None)

    def _rejoined(self, match: _Match) -> Node | None:
        if match.is_identity:
            with self.graph.inserting_before(match.node):
                return self._copied(match)
        if not _is_written_to(match):
            return None
        self._take_replaced_rows(match)
        with_sums = [i for i, sums in enumerate(match.sums) if sums]
        read_between = any(_outside_users(match, i, s) for i in with_sums for s in match.sums[i])
        if read_between:
            alone = len(with_sums) == 1 and None not in match.pieces
            return self._total_by_total(match, with_sums[0]) if alone else None
        return self._added_at_once(match)

    def _take_replaced_rows(self, match: _Match) -> None:
        """Who takes nothing but rows that others were put in the place of takes these: no source has anything there."""
        for user in list(match.node.users):
            piece = piece_of(user)
            if piece is None or piece.source is not match.node or piece.dim != match.join.dim:
                continue
            at: Any = 0
            for part, kept in zip(match.join.parts, match.pieces, strict=True):
                size = 1 if match.join.stacked else shape_of(part)[match.join.dim]
                if kept is None and sizes_agree(piece.start, at) and sizes_agree(piece.size, size):
                    self._take_part(user, part, match.join, dropped=piece.dropped)
                at = at + size

    def _take_part(self, user: Node, part: Node, join: Join, *, dropped: bool) -> None:
        with self.graph.inserting_before(user):
            if dropped is join.stacked:
                taken = emit(self.graph, "clone", (part,), like=user, value=value_of(user))
            elif dropped:
                taken = emit(self.graph, "select", (part, join.dim, 0), like=user)
            else:
                return
        user.replace_all_uses_with(taken)
        self.graph.erase_node(user)

    def _copied(self, match: _Match) -> Node:
        copied = emit(self.graph, "clone", (match.source,), like=match.node, value=value_of(match.node))
        copied.kwargs = {"memory_format": torch.contiguous_format}  # a join lies in memory in its own order
        return copied

    def _added_at_once(self, match: _Match) -> Node | None:
        """What is written to all rows as one addend, and a second one where a row is added to twice."""
        with self.graph.inserting_before(match.node):
            total = self._without_replaced_rows(match)
            if total is None:
                return None
            for level in range(max(1, *map(len, match.sums))):
                rows = [self._row(match, i, level) for i in range(len(match.pieces))]
                total = self._plus(match, total, rows, like=match.node)
        return total

    def _row(self, match: _Match, index: int, level: int) -> Node:
        """What an addend has in the place of a part."""
        part, sums = match.join.parts[index], match.sums[index]
        if match.pieces[index] is None and level == 0:
            return part
        if level >= len(sums):
            return emit(self.graph, "zeros_like", (part,), like=part, dialect=match.node)
        return self._scaled(sums[level], like=match.node)

    def _scaled(self, part: Part, *, like: Node) -> Node:
        """The addend of a part in the shape of the part."""
        addend = part.addend
        assert addend is not None and part.below is not None
        if not same_shape(addend, part.node):
            addend = emit(self.graph, "expand_as", (addend, part.below.node), like=addend, dialect=like)
        if part.scale != 1:
            addend = emit(self.graph, "mul", (addend, part.scale), like=addend, dialect=like)
        return addend

    def _plus(self, match: _Match, total: Node, rows: list[Node], *, like: Node) -> Node:
        # Named after what writes it: a term goes by the module of its addend.
        writer = next((r for r in rows if r in match.written), rows[0])
        joined = "stack" if match.join.stacked else "cat"
        addend = emit(self.graph, joined, (rows, match.join.dim), like=writer, dialect=match.node)
        return emit(self.graph, "add", (total, addend), like=like, dialect=match.node)

    def _without_replaced_rows(self, match: _Match) -> Node | None:
        """The tensor with zeros where other rows stand in the join; None where their place is not a number."""
        total, at = match.source, 0
        for part, piece in zip(match.join.parts, match.pieces, strict=True):
            size = 1 if match.join.stacked else shape_of(part)[match.join.dim]
            if piece is None:
                if not isinstance(size, int) or not isinstance(at, int):
                    return None
                zeros = emit(self.graph, "zeros_like", (part,), like=match.node)
                name, place = ("select_scatter", (at,)) if match.join.stacked else ("slice_scatter", (at, at + size))
                total = emit(self.graph, name, (total, zeros, match.join.dim, *place), like=match.node)
            at = at + size
        return total

    def _total_by_total(self, match: _Match, index: int) -> Node | None:
        """One part is added to and read in between: each sum is one of the whole, and its readers take their rows."""
        piece, first = match.pieces[index], match.sums[index][0].node
        assert piece is not None
        if match.source >= first or not all(p and may_stand_before(p, first) for p in match.pieces):
            return None
        total = match.source
        self.parts.forget()
        for part in match.sums[index]:
            with self.graph.inserting_before(part.node):
                rows = [self._total_row(match, i, part if i == index else None) for i in range(len(match.pieces))]
                total = self._plus(match, total, rows, like=part.node)
                seen = piece_of_other(piece, total)
            for user in _outside_users(match, index, part):
                user.replace_input_with(part.node, seen)
        return total

    def _total_row(self, match: _Match, index: int, part: Part | None) -> Node:
        piece = match.pieces[index]
        assert piece is not None
        if part is not None:
            return self._scaled(part, like=match.node)
        rows = piece_of_other(piece, match.source)
        return emit(self.graph, "zeros_like", (rows,), like=rows, dialect=match.node)


def _list_items_(node: Node) -> None:
    """Let a join of all that a split has made name each of it, as where nobody asked a tracer how many there are."""
    split = node.args[0] if node.args else None
    if not isinstance(split, Node) or op_name(node) not in JOIN_NAMES or not has_trait(split, Trait.SPLITS):
        return
    values = value_of(split)
    if isinstance(values, list | tuple):
        with node.graph.inserting_before(node):
            items = [insert_call(node.graph, getitem, (split, i), like=split, value=v) for i, v in enumerate(values)]
        node.args = (items, *node.args[1:])


def _flat(node: Node) -> Join | None:
    """A join with the parts of what it joins along the same dimension in their place."""
    join = join_of(node)
    if join is None or join.stacked:
        return join
    parts: list[Node] = []
    for part in join.parts:
        inner = join_of(part)
        same = inner is not None and not inner.stacked and inner.dim == join.dim and inner.parts
        parts += same or [part]
    return Join(tuple(parts), join.dim, False)


def _outside_users(match: _Match, index: int, part: Part) -> list[Node]:
    """Who takes in a sum of a part, the next sum and the join aside."""
    chain = {s.node for s in match.sums[index]} | {match.node}
    return [u for u in part.node.users if u not in chain]


def _is_written_to(match: _Match) -> bool:
    """Whether what is written into rows may be part of a stream; features are never replaced."""
    replaced = None in match.pieces
    if replaced and match.join.dim == len(shape_of(match.node)) - 1:
        return False
    return may_be_written(match.written, match.source)


def _same_dtype(a: Node, b: Node) -> bool:
    left, right = tensor_of(a), tensor_of(b)
    return left is not None and right is not None and left.dtype == right.dtype
