"""The rewrite of one graph from Dynamo: the passes that `convert` uses, on the queries that the graph takes."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.fx import GraphModule, Node

from attnres_fx.backend.attachment import Attachment, ReadKey, read_key
from attnres_fx.backend.compile_log import CompiledGraph, compile_log
from attnres_fx.backend.mismatch import mismatch_message, no_marker_message
from attnres_fx.config import AttnResConfig
from attnres_fx.errors import BackendError, ScheduleError
from attnres_fx.ops.marker import PARAMETERS
from attnres_fx.passes import (
    Lowering,
    ReadParameters,
    ReadPlan,
    StreamSet,
    find_streams,
    insert_depth_attention_pass,
    lower_,
    normalize_,
    plan_depth_reads,
    run_pass,
)
from attnres_fx.passes.graph.copying import copy_graph
from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.graph.operations import trains
from attnres_fx.passes.lowering.read_calls import OPERATORS, kernels_of

log = logging.getLogger(__name__)


def rewrite_graph(gm: GraphModule, inner: str, lowering: Lowering) -> GraphModule:
    """A copy of Dynamo's graph whose streams are read through depth attention.

    A graph that reads through depth attention already is only lowered.

    Args:
        gm: As Dynamo hands it to a backend; it is left as it is.
        inner: The compiler that the copy is for, which goes into the log.
        lowering: What is folded into the reads.

    Raises:
        BackendError: The graph has no queries, or its reads are not those that were attached.
    """
    marker = next((n for n in gm.graph.nodes if n.target is PARAMETERS), None)
    if marker is None and any(n.target in OPERATORS for n in gm.graph.nodes):
        copied = _copied(gm)
        lower_(copied, lowering, training=torch.is_grad_enabled())
        return copied
    if marker is None:
        raise BackendError(no_marker_message(gm))
    about = str(marker.args[1])
    attachment = Attachment.from_text(about)
    copied = _copied(gm)
    marker = next(n for n in copied.graph.nodes if n.target is PARAMETERS)
    tensors = marker.args[0]
    assert isinstance(tensors, list | tuple)
    weights = _weights_by_read(attachment.reads, tensors)  # type: ignore[arg-type]
    copied.graph.erase_node(marker)
    results = normalize_(copied)
    streams = find_streams(copied.graph)
    plan = _match_reads(gm, streams, attachment)
    _check_placement(copied, plan, weights)
    result = run_pass(
        insert_depth_attention_pass,
        copied,
        streams=streams,
        plan=plan,
        eps=attachment.config.eps,
        fetch=lambda read, like: weights[read.read],
    )
    lowered = lower_(copied, lowering, training=torch.is_grad_enabled())
    copied.recompile()
    changed = [str(r) for r in (*results, result, *lowered) if r.modified]
    _log_graph(about, copied, len(attachment.reads), changed, inner)
    return copied


def _copied(gm: GraphModule) -> GraphModule:
    """A copy on the same tensors, with what Dynamo knows of its inputs: which are parameters and stay in place."""
    copied = GraphModule(gm, copy_graph(gm.graph))
    copied.meta = dict(gm.meta)
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied


def _weights_by_read(keys: Sequence[ReadKey], tensors: Sequence[Node]) -> dict[str, ReadParameters]:
    if len(tensors) != sum(2 + k.gated for k in keys):
        raise BackendError(f"model.attnres holds {len(tensors)} tensors for {len(keys)} reads: attach the model anew.")
    nodes = iter(tensors)
    return {k.name: ReadParameters(next(nodes), next(nodes), next(nodes) if k.gated else None) for k in keys}


def _match_reads(gm: GraphModule, streams: StreamSet, attachment: Attachment) -> ReadPlan:
    """The plan whose reads are those that were attached, or an error that says where they are not."""
    names = {s.name for s in streams.streams}
    option = attachment.config.streams
    known = option if isinstance(option, str) else [n for n in option if n in names]
    selected = streams.select(known) if known else ()
    try:
        plan = plan_depth_reads(streams, selected, attachment.config)
    except ScheduleError:  # a part of the model has fewer sublayers; what its reads are does not depend on blocks
        plain = AttnResConfig(variant="full", output=attachment.config.output)
        plan = plan_depth_reads(streams, selected, plain)
    actual = {read_key(read) for read in plan.reads}
    expected = set(attachment.reads)
    if actual == expected:
        return plan
    raise BackendError(mismatch_message(gm, expected, actual))


def _check_placement(gm: GraphModule, plan: ReadPlan, weights: Mapping[str, ReadParameters]) -> None:
    """Queries must be where the sources are, in their dtype or in float32."""
    nodes = {n.name: n for n in gm.graph.nodes}
    for read in plan.reads:
        source, query = tensor_of(nodes[read.site]), tensor_of(weights[read.read].query)
        assert source is not None and query is not None
        if source.device != query.device:
            raise BackendError(
                f"the read {read.read} of {read.stream} is on {source.device} and its query on {query.device}: move "
                f"model.attnres with the model."
            )
        same_kind = torch.promote_types(source.dtype, query.dtype) == query.dtype
        if not same_kind and not torch.is_autocast_enabled(source.device.type):
            raise BackendError(
                f"the read {read.read} of {read.stream} is {source.dtype} and its query {query.dtype}: cast "
                f"model.attnres with the model; float32 queries are taken everywhere."
            )


def _log_graph(about: str, gm: GraphModule, reads: int, changed: Sequence[str], inner: str) -> None:
    modes = {trains(n) for n in gm.graph.nodes} - {None}
    mode = "" if not modes else "train" if True in modes else "eval"
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and not _is_static(n)]
    shapes = tuple(
        f"{list(t.shape)}".replace(" ", "") for n in inputs if (t := tensor_of(n)) is not None and t.dim() > 0
    )
    kernels = ", ".join(sorted(kernels_of(gm)))
    graph = CompiledGraph(mode, torch.is_grad_enabled(), shapes, reads, tuple(changed), inner, kernels)
    compile_log(about).graphs.append(graph)
    log.info("compiled %s", graph)


def _is_static(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
