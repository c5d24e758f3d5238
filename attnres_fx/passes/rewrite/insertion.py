"""The nodes of one read: the operator, and on post-norm streams the gate behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch.fx import Node

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import RewriteError
from attnres_fx.ops.general import DEPTH_ATTENTION_GENERAL, general_arguments
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.ops.read_form import ReadForm
from attnres_fx.ops.read_style import ReadStyle
from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import fake_like, insert_call, tensor_of
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan
from attnres_fx.passes.rewrite.steps import turn_rows
from attnres_fx.passes.streams.feature_dimensions import LAST


@dataclass(frozen=True)
class ReadParameters:
    """The nodes that hold the parameters of a read.

    Attributes:
        query: The query, [D] or [D, D]; None with static weights.
        key_weight: The key gain, [D]; None with static weights.
        gate: The gate, [], of a read on a post-norm stream.
        bias: [S], one number a source.
    """

    query: Node | None
    key_weight: Node | None
    gate: Node | None = None
    bias: Node | None = None


def insert_read(
    read: DepthReadPlan, site: Node, sources: Sequence[Node], parameters: ReadParameters, config: AttnResConfig
) -> tuple[Node, Node]:
    """Insert a read at the graph's insertion point.

    Args:
        read: What was planned.
        site: The node whose value it replaces.
        sources: The nodes of the plan's sources, each [..., D], whatever dimension of the site the features are in.
        parameters: The nodes of its parameters.
        config: eps, and the form of the read.

    Returns:
        The node that takes the place of the site, and the depth-attention node; without a gate they are one.

    Raises:
        RewriteError: The read is gated and has no gate.
    """
    values = [v for v in map(tensor_of, sources) if v is not None]
    out = fake_like(values[0], reduce(torch.promote_types, (v.dtype for v in values)))
    target, options = _operator(parameters, config)
    args = (list(sources), parameters.query, parameters.key_weight, config.eps, read.gain, *options)
    node = insert_call(site.graph, target, args, like=site, value=out)
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


def _operator(parameters: ReadParameters, config: AttnResConfig) -> tuple[Any, tuple[Any, ...]]:
    """The operator that has the form of a read, the one with kernels where it can, and its last arguments."""
    style, form = ReadStyle(parameters.bias, config.scale, config.value_norm), ReadForm.of(config)
    if form == ReadForm() and config.query == "static" and config.has_queries:
        return DEPTH_ATTENTION, style.to_arguments()
    return DEPTH_ATTENTION_GENERAL, general_arguments(style, form)
