"""The rewrite of one graph from Dynamo: the passes that `convert` uses, on the queries that the graph takes."""

import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import GraphModule, Node

from attnres_fx.backend.compile_log import CompiledGraph, compile_log
from attnres_fx.backend.handed_over import handed_over, module_paths
from attnres_fx.backend.matching import MatchedReads, match_reads
from attnres_fx.backend.mismatch import no_marker_message
from attnres_fx.errors import BackendError
from attnres_fx.ops.marker import PARAMETERS
from attnres_fx.passes import Lowering, find_streams, lower_, normalize_, run_pass, topology_of
from attnres_fx.passes.graph.copying import copy_graph
from attnres_fx.passes.graph.module_paths import name_modules_
from attnres_fx.passes.graph.nodes import nodes_with_bodies, tensor_of
from attnres_fx.passes.graph.operations import trains
from attnres_fx.passes.lowering.read_calls import OPERATORS, kernels_of
from attnres_fx.passes.normalize.inline_regions import hidden_regions

log = logging.getLogger(__name__)


def rewrite_graph(gm: GraphModule, inner: str, lowering: Lowering) -> GraphModule:
    """A copy of Dynamo's graph whose streams are read through depth attention.

    A graph that reads through depth attention already is only lowered; one without streams, as a hook has, stays.

    Args:
        gm: As Dynamo hands it to a backend; it is left as it is.
        inner: The compiler that the copy is for, which goes into the log.
        lowering: What is folded into the reads.

    Raises:
        BackendError: The graph has no queries, or its reads are not those that were attached.
    """
    copied = _copied(gm)
    if not any(n.target is PARAMETERS for n in nodes_with_bodies(copied)):
        if any(n.target in OPERATORS for n in gm.graph.nodes):
            lower_(copied, lowering, training=torch.is_grad_enabled())
            return copied
        if _may_hold_a_stream(gm):
            raise BackendError(no_marker_message(gm))
        return copied
    results = normalize_(copied)
    handed = handed_over(copied)
    name_modules_(nodes_with_bodies(copied), module_paths(handed.calls))
    for call in handed.calls:
        copied.graph.erase_node(call)
    streams = find_streams(copied.graph)
    matched = match_reads(copied, streams, handed)
    _check_placement(copied, matched)
    result = run_pass(
        topology_of(handed.config).insert,
        copied,
        streams=streams,
        plan=matched.plan,
        config=handed.config,
        fetch=lambda read, like, name: matched.weights[read.read].get(name),
    )
    lowered = lower_(copied, lowering, training=torch.is_grad_enabled())
    copied.recompile()
    changed = [str(r) for r in (*results, result, *lowered) if r.modified]
    _log_graph(handed.about, copied, len(matched.weights), changed, inner)
    return copied


def _may_hold_a_stream(gm: GraphModule) -> bool:
    """Whether leaving a graph as it is could leave residuals plain. A hook of an attached model has a graph without."""
    normalized = _copied(gm)
    normalize_(normalized)
    found = find_streams(normalized.graph)
    return bool(found.streams or found.refusals or hidden_regions(normalized))


def _copied(gm: GraphModule) -> GraphModule:
    """A copy on the same tensors, bodies too, with what Dynamo knows of its inputs: which are parameters."""
    copied = GraphModule(gm, copy_graph(gm.graph))
    copied.meta = dict(gm.meta)
    copied.__dict__["compile_subgraph_reason"] = getattr(gm, "compile_subgraph_reason", None)
    for name, body in list(copied.named_children()):
        if isinstance(body, GraphModule):
            setattr(copied, name, _copied(body))
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied


def _check_placement(gm: GraphModule, matched: MatchedReads) -> None:
    """Queries must be where the sources are, in their dtype or in float32, and a bias has a number for each source."""
    nodes = {n.name: n for n in gm.graph.nodes}
    for read in matched.plan.reads:
        weights = matched.weights[read.read]
        source, query = tensor_of(nodes[read.site]), tensor_of(next(iter(weights.values())))
        bias = tensor_of(weights["bias"]) if "bias" in weights else None
        assert source is not None and query is not None
        if bias is not None and bias.shape != (read.num_sources,):
            raise BackendError(
                f"the read {read.read} of {read.stream} has {read.num_sources} sources here and a bias for "
                f"{bias.numel()}: attach the part of the model that runs by itself, or leave source_bias out."
            )
        if source.device != query.device:
            raise BackendError(
                f"the read {read.read} of {read.stream} is on {source.device} and its query on {query.device}: move "
                f"model.attnres with the model."
            )
        same_kind = torch.promote_types(source.dtype, query.dtype) == query.dtype
        if not same_kind and not torch.is_autocast_enabled(source.device.type):
            raise BackendError(
                f"the read {read.read} of {read.stream} is {source.dtype} and its query {query.dtype}: a query "
                f"may be more precise than the stream, and not less. Cast them: model.attnres.to({source.dtype})."
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
