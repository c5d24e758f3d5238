"""The nodes that hold what each sublayer writes, in a graph that reads its depth.

Its additions are gone there. Without blocks every output is a source of some read; in a block it is what one partial
sum has more than the one before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from torch.fx import Node

from attnres_fx.passes.depth_source import Source
from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.graph.operations import op_name
from attnres_fx.passes.rewrite.execution import Replacement


def written_nodes(reads: Sequence[Replacement], count: int, nodes: Mapping[str, Node]) -> list[tuple[str, ...]]:
    """The nodes whose sum the root of a stream and each of its sublayers wrote.

    Args:
        reads: Of the stream, in execution order.
        count: Sublayers of the stream.
        nodes: Of the graph, by name.

    Returns:
        For the root and every sublayer; no node where no read tells.
    """
    seen: dict[Source, list[Node]] = {}
    for read in reads:
        for source, node in zip(read.plan.seen, read.source_nodes, strict=False):
            seen.setdefault(_as_sum(source), []).append(nodes[node])
    written: list[tuple[str, ...]] = [()] * (count + 1)
    for source, places in seen.items():
        if source.kind == "root":
            written[0] = (_unmapped(places).name,)
        elif source.stop - source.start == 1:
            written[source.stop] = (_unmapped(places).name,)
    sums = sorted((s for s in seen if s.kind == "block"), key=lambda s: s.stop)
    for before, after in pairwise(sums):
        if before.start == after.start:
            begun, addends = _peeled(seen[after][0], _chain(seen[before][0]))
            if begun is not None:
                written[after.stop] = tuple(a.name for a in addends)
                if before.stop - before.start == 1:  # as it is added to, not as a read sees it
                    written[before.stop] = (begun.name,)
    return written


def _as_sum(source: Source) -> Source:
    """A partial sum and a block that end at one sublayer are one value."""
    return Source("block", source.block, source.start, source.stop) if source.kind == "partial" else source


def _chain(node: Node) -> list[Node]:
    """A node, and what it is a map of: casts, views, factors."""
    chain = [node]
    while len(inputs := list(_tensors(chain[-1]))) == 1:
        chain.append(inputs[0])
    return chain


def _tensors(node: Node) -> Iterator[Node]:
    return (n for n in node.all_input_nodes if tensor_of(n) is not None and n.op != "get_attr")


def _unmapped(places: Sequence[Node]) -> Node:
    """What several reads see, each through maps of its own."""
    others = [set(_chain(p)) for p in places[1:]]
    return next((n for n in _chain(places[0]) if all(n in other for other in others)), places[0])


def _peeled(node: Node, before: Sequence[Node]) -> tuple[Node | None, list[Node]]:
    """What a sum adds to an earlier one: the earlier one as it stands in the sum, and the addends."""
    chain = _chain(node)
    for part in chain:
        if part in before:
            return part, []
    if op_name(chain[-1]) != "add":
        return None, []
    operands = list(_tensors(chain[-1]))
    for operand in operands:
        begun, addends = _peeled(operand, before)
        if begun is not None:
            return begun, [*addends, *(o for o in operands if o is not operand)]
    return None, []
