"""A captured model's graphs analysed, planned and rewritten: the same reads in every graph."""

import functools
from collections.abc import Mapping, Sequence

from torch import nn
from torch.fx import Graph, GraphModule, Node

from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.restore import restore_autograd_pass
from attnres_fx.errors import RewriteError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import (
    DepthReadPlan,
    ReadPlan,
    Replacement,
    Stream,
    StreamSet,
    run_pass,
    topology_of,
)
from attnres_fx.passes.graph.module_paths import module_at, module_path
from attnres_fx.passes.graph.nodes import fake_parameter, insert_attribute, tensor_of
from attnres_fx.passes.rewrite.outline_regions import outline_recomputed_pass
from attnres_fx.stream_reads import attribute_name


def same_streams(streams: StreamSet, selected: Sequence[Stream]) -> tuple[Stream, ...]:
    """The selected streams as another mode's graph has them."""
    names = {s.name for s in selected}
    return tuple(s for s in streams.streams if s.name in names)


def require_same_reads(streams_of_modes: Mapping[Mode, StreamSet], selected: Sequence[Stream]) -> None:
    expected = {s.name: [(r.name, r.position, len(r.extras)) for r in s.depth_reads] for s in selected}
    for mode, streams in streams_of_modes.items():
        have = {
            s.name: [(r.name, r.position, len(r.extras)) for r in s.depth_reads]
            for s in streams.streams
            if s.name in expected
        }
        if have != expected:
            names = {r[0] for reads in have.values() for r in reads} ^ {
                r[0] for reads in expected.values() for r in reads
            }
            raise RewriteError(
                f"the train and the eval graph do not have the same reads ({', '.join(sorted(names)) or 'order'} "
                f"in one only, seen in {mode} mode). Dropout on the stream itself does this: move it onto the "
                f"branch, set its probability to 0, or convert a graph of one mode."
            )


def modules_that_add(root: nn.Module, gm: GraphModule, plan: ReadPlan) -> tuple[str, ...]:
    """The submodules whose own code adds to a stream that is rewritten, and those around them.

    Args:
        root: The module tree.
        gm: The graph, not rewritten yet.
        plan: Of the graph.
    """
    nodes = {n.name: n for n in gm.graph.nodes}
    paths: dict[str, None] = {}
    for stream in plan.streams:
        for term in stream.stream.terms[1:]:
            parts = module_path(nodes[term.written_by]).split(".") if term.written_by in nodes else []
            paths |= {".".join(parts[: i + 1]): None for i in range(len(parts)) if parts[0]}
    return tuple(p for p in paths if module_at(root, p) is not None)


def rewrite_(
    gm: GraphModule, streams: StreamSet, plan: ReadPlan, parameters: AttnResParameters
) -> tuple[Replacement, ...]:
    """Execute a read plan on an analysed graph with these parameters, in place."""
    gm.add_module("attnres", parameters)
    config = parameters.config
    fetch = functools.partial(_fetch, gm.graph, parameters)
    result = run_pass(topology_of(config).insert, gm, streams=streams, plan=plan, config=config, fetch=fetch)
    run_pass(outline_recomputed_pass, gm)
    restore_autograd_pass(gm)
    return result.replaced


def _fetch(graph: Graph, parameters: AttnResParameters, read: DepthReadPlan, like: Node, name: str) -> Node | None:
    held = parameters.reads[read.read].tensors().get(name)
    value = tensor_of(like)
    assert value is not None
    if held is None:
        return None
    fake = fake_parameter(value, tuple(held.shape), held.dtype)
    return insert_attribute(graph, f"attnres.reads.{attribute_name(read.read)}.{name}", like=like, value=fake)
