"""From the formal sums of a graph to its residual streams."""

from functools import partial

from torch.fx import Graph, Node

from attnres_fx.passes.graph.nodes import describe
from attnres_fx.passes.streams.chain import StreamChain
from attnres_fx.passes.streams.formal_sum import FormalSums, Root
from attnres_fx.passes.streams.interpretation import find_formal_sums
from attnres_fx.passes.streams.interruptions import find_interruptions
from attnres_fx.passes.streams.names import name_streams
from attnres_fx.passes.streams.nesting import (
    allow_inside_sublayers,
    injected_into,
    nest_streams,
    refuse_injected,
)
from attnres_fx.passes.streams.post_norm import link_post_norm
from attnres_fx.passes.streams.refusals import Refusal, find_refusals
from attnres_fx.passes.streams.root_states import RootStates
from attnres_fx.passes.streams.stream import StreamSet


def find_streams(graph: Graph) -> StreamSet:
    """Find every residual stream of a graph.

    Args:
        graph: A graph without mutations, with values on its nodes. It is left as it is.

    Returns:
        The streams in graph order, what looks like one and is refused, and the sums they were found in.
    """
    sums = find_formal_sums(graph)
    convertible, refusals = _without_refused([s for s in map(partial(RootStates, sums), _roots(sums)) if s.terms])
    chains = [StreamChain(tuple(chain)) for chain in link_post_norm(convertible)]
    streams = nest_streams(name_streams([c.to_stream() for c in chains]), chains)
    refusals += allow_inside_sublayers(find_refusals(graph, sums), chains)
    refusals += find_interruptions(streams, chains)
    return StreamSet(tuple(streams), tuple(refusals), sums)


def _without_refused(roots: list[RootStates]) -> tuple[list[RootStates], list[Refusal]]:
    """The roots of streams of their own with a fixed width in the last dimension, and why the others are none."""
    injected = {s: into for s in roots if (into := injected_into(s, roots)) is not None}
    own = [s for s in roots if s not in injected]
    fixed = [s for s in own if s.fixed_width is not None and s.channels_first is None]
    refusals = [refuse_injected(s, into) for s, into in injected.items()]
    return fixed, refusals + [_refuse_width(s) for s in own if s not in fixed]


def _refuse_width(stream: RootStates) -> Refusal:
    if stream.channels_first is not None:
        why = f"its features are not in the last dimension: {describe(stream.channels_first)} works on dimension 1"
    else:
        why = "its last dimension has no fixed size, so a query has no width"
    return Refusal("width", describe(stream.root), why)


def _roots(sums: FormalSums) -> list[Node]:
    return [n for n, s in sums.states.items() if isinstance(s, Root)]
