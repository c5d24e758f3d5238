"""From the formal sums of a graph to its residual streams."""

from torch.fx import Graph, Node

from attnres_fx.passes.graph.nodes import describe
from attnres_fx.passes.streams.chain import StreamChain
from attnres_fx.passes.streams.formal_sum import FormalSums, Root, find_formal_sums
from attnres_fx.passes.streams.names import name_streams
from attnres_fx.passes.streams.nesting import (
    allow_inside_sublayers,
    find_interruptions,
    injected_into,
    nest_streams,
    refuse_injected,
)
from attnres_fx.passes.streams.post_norm import link_post_norm
from attnres_fx.passes.streams.refusals import Refusal, find_refusals
from attnres_fx.passes.streams.root_states import RootStates
from attnres_fx.passes.streams.stream import StreamSet


def find_streams(graph: Graph) -> StreamSet:
    """Every residual stream of a graph without mutations, with values on its nodes."""
    sums = find_formal_sums(graph)
    raw = [RootStates(sums, root) for root in _roots(sums)]
    raw = [s for s in raw if s.terms]
    injected = {s: into for s in raw if (into := injected_into(s, raw)) is not None}
    raw = [s for s in raw if s not in injected]
    fixed = [s for s in raw if s.fixed_width is not None and s.channels_first is None]
    refusals = [refuse_injected(s, into) for s, into in injected.items()]
    refusals += [_refuse_width(s) for s in raw if s not in fixed]
    chains = link_post_norm(fixed)
    found = [StreamChain(tuple(chain)) for chain in chains]
    streams = name_streams([c.to_stream() for c in found])
    streams = nest_streams(streams, found)
    refusals += allow_inside_sublayers(find_refusals(graph, sums), found)
    refusals += find_interruptions(streams, found)
    return StreamSet(tuple(streams), tuple(refusals), sums)


def _refuse_width(stream: RootStates) -> Refusal:
    if stream.channels_first is not None:
        why = f"its features are not in the last dimension: {describe(stream.channels_first)} works on dimension 1"
    else:
        why = "its last dimension has no fixed size, so a query has no width"
    return Refusal("width", describe(stream.root), why)


def _roots(sums: FormalSums) -> list[Node]:
    return [n for n, s in sums.states.items() if isinstance(s, Root)]
