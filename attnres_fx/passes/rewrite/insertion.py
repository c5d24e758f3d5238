"""The nodes of one read: the operator, and on post-norm streams the gate behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch.fx import Node

from attnres_fx.errors import RewriteError
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import fake_like, insert_call, tensor_of
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan
from attnres_fx.passes.rewrite.steps import turn_rows
from attnres_fx.passes.streams.feature_dimensions import LAST


@dataclass(frozen=True)
class ReadParameters:
    """The nodes that hold the parameters of a read.

    Attributes:
        query: The query, [D].
        key_weight: The key gain, [D].
        gate: The gate, [], of a read on a post-norm stream.
    """

    query: Node
    key_weight: Node
    gate: Node | None = None


def insert_read(
    read: DepthReadPlan, site: Node, sources: Sequence[Node], parameters: ReadParameters, eps: float
) -> tuple[Node, Node]:
    """Insert a read at the graph's insertion point.

    Args:
        read: What was planned.
        site: The node whose value it replaces.
        sources: The nodes of the plan's sources, each [..., D], whatever dimension of the site the features are in.
        parameters: The nodes of its parameters.
        eps: Added to the mean square of a source.

    Returns:
        The node that takes the place of the site, and the depth-attention node; without a gate they are one.

    Raises:
        RewriteError: The read is gated and has no gate.
    """
    values = [v for v in map(tensor_of, sources) if v is not None]
    out = fake_like(values[0], reduce(torch.promote_types, (v.dtype for v in values)))
    args = (list(sources), parameters.query, parameters.key_weight, eps, read.gain)
    node = insert_call(site.graph, DEPTH_ATTENTION, args, like=site, value=out)
    mixed = node
    if read.dimension != LAST:
        mixed = turn_rows(site.graph, node, -1, read.dimension, like=site)
    return moved_by_gate(read, site, mixed, parameters.gate), node


def moved_by_gate(read: DepthReadPlan, site: Node, mixed: Node, gate: Node | None) -> Node:
    """What takes the place of a state on a post-norm stream: `r + g * (mixed - r)`, exactly r while the gate is zero.

    Args:
        read: What was planned; without a gate the result is `mixed`.
        site: The node whose value is r.
        mixed: What was read.
        gate: The node of the gate, [].

    Raises:
        RewriteError: The read is gated and has no gate.
    """
    if not read.gated:
        return mixed
    if gate is None:
        raise RewriteError(f"the read {read.read!r} is on a post-norm stream and needs a gate.")
    out = tensor_of(mixed)
    difference = emit(site.graph, "sub", (mixed, site), like=site, value=out)
    scaled = emit(site.graph, "mul", (difference, gate), like=site, value=out)
    return emit(site.graph, "add", (site, scaled), like=site, value=out)
