"""From the formal sums of a graph to its residual streams."""

from itertools import pairwise

from torch.fx import Graph, Node

from attnres_fx.passes.graph.nodes import describe, shape_of
from attnres_fx.passes.streams.beside import sums_beside
from attnres_fx.passes.streams.chain import StreamChain
from attnres_fx.passes.streams.data import find_data
from attnres_fx.passes.streams.feature_dimensions import LAST
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Root
from attnres_fx.passes.streams.interpretation import find_formal_sums
from attnres_fx.passes.streams.interruptions import Interruption, find_interruptions, refuse_prelude
from attnres_fx.passes.streams.names import name_streams
from attnres_fx.passes.streams.nesting import (
    find_nesting,
    injected_into,
    nest_streams,
    refuse_injected,
    without_those_inside,
)
from attnres_fx.passes.streams.own_rows import sums_of_own_rows
from attnres_fx.passes.streams.post_norm import link_post_norm
from attnres_fx.passes.streams.recurrences import Slices
from attnres_fx.passes.streams.refusals import Refusal, find_refusals, refuse_depth_readers, refuse_recurrence
from attnres_fx.passes.streams.root_states import RootStates
from attnres_fx.passes.streams.stream import Stream, StreamSet


def find_streams(graph: Graph) -> StreamSet:
    """Find every residual stream of a graph.

    Args:
        graph: A graph without mutations, with values on its nodes. It is left as it is.

    Returns:
        The streams in graph order, what looks like one and is refused, and the sums they were found in.
    """
    sums = _sums_of(graph)
    roots = [s for s in (RootStates(sums, n) for n in _roots(sums)) if s.terms]
    convertible, injected, refusals = _without_refused(roots)
    chains = _without_tables([StreamChain(tuple(chain)) for chain in link_post_norm(convertible)], sums)
    chains, over_time = _without_recurrences(chains, sums)
    refusals += over_time
    streams, interruptions = _named(chains)
    if preludes := _preludes(interruptions, chains):
        begun = [(i.first, chains[i.after]) for i in preludes]
        before = {i.before for i in preludes}
        chains = [c for i, c in enumerate(chains) if i not in before]
        streams, interruptions = _named(chains)
        refusals += [refuse_prelude(first, streams[chains.index(after)].name) for first, after in begun]
    refusals = _injected(injected, streams, chains) + refusals
    refusals += without_those_inside(find_refusals(graph, sums), chains)
    refusals += dict.fromkeys(i.refusal for i in interruptions)
    refusals = [*refuse_depth_readers(sums.nodes), *refusals]
    return StreamSet(tuple(streams), tuple(refusals), sums)


def _named(chains: list[StreamChain]) -> tuple[list[Stream], list[Interruption]]:
    streams = [c.to_stream() for c in chains]
    nesting = find_nesting(streams, chains)
    order = sorted(range(len(chains)), key=lambda i: not nesting.is_main(i))
    streams = nest_streams(name_streams(streams, [c.branch_paths() for c in chains], order), nesting)
    return streams, find_interruptions(streams, chains)


def _preludes(interruptions: list[Interruption], chains: list[StreamChain]) -> list[Interruption]:
    """Ends of sums that only prepare the root of a stream: one sublayer before the first of a deeper one, and a norm.

    A token that is smeared over the next, an embedding that is convolved, and then normed.
    """
    begun = {i.after for i in interruptions}
    return [
        i
        for i in interruptions
        if i.normed and i.before not in begun and chains[i.before].num_sublayers == 1 < chains[i.after].num_sublayers
    ]


def _sums_of(graph: Graph) -> FormalSums:
    """The formal sums of a graph, without those beside a stream and those that only prepare its root."""
    beside: set[tuple[Node, Node]] = set()
    while True:
        sums = find_formal_sums(graph, beside)
        found = (sums_beside(sums) | sums_of_own_rows(sums)) - beside
        if not found:
            return sums
        beside |= found


def _without_refused(
    roots: list[RootStates],
) -> tuple[list[RootStates], dict[RootStates, RootStates], list[Refusal]]:
    """The roots of streams whose features are in one dimension of fixed size, and why the others are none.

    Between them those that are only added inside the sublayers of another, each with the other.
    """
    # One vector for a whole batch, beside streams of rows, is a statistic of theirs: a running mean, say.
    most = max((len(shape_of(s.root)) for s in roots), default=0)
    roots = [s for s in roots if len(shape_of(s.root)) > 1 or most == 1]
    injected = {s: into for s in roots if (into := injected_into(s, roots)) is not None}
    own = [s for s in roots if s not in injected]
    fixed = [s for s in own if s.fixed_width is not None and not s.features.contradiction]
    return fixed, injected, [_refuse_width(s) for s in own if s not in fixed]


def _injected(
    injected: dict[RootStates, RootStates], streams: list[Stream], chains: list[StreamChain]
) -> list[Refusal]:
    """What is said of roots that are added inside the sublayers of a stream; nothing where that is none itself."""
    name = {part: stream.name for stream, chain in zip(streams, chains, strict=True) for part in chain.parts}
    return [refuse_injected(s, name[into]) for s, into in injected.items() if into in name]


def _without_recurrences(chains: list[StreamChain], sums: FormalSums) -> tuple[list[StreamChain], list[Refusal]]:
    """The streams over depth, and why the others are none."""
    slices = Slices(sums.nodes, sums.features)
    kept, refusals = [], []
    for chain in chains:
        addends = {t: [a] for p in chain.parts for t in p.terms if (a := sums.addend(t)) is not None}
        steps = slices.over_time(addends, [n for p in chain.parts for n in p.carried()])
        if not steps.keys() >= set(list(addends)[1:]):  # the first may begin the sum in its own way
            steps = {}
        if steps := steps or _steps_of_root(chain, slices):
            refusals.append(refuse_recurrence(chain.parts[0].root, next(iter(steps.values()))))
        else:
            kept.append(chain)
    return kept, refusals


def _steps_of_root(chain: StreamChain, slices: Slices) -> dict[Node, Node]:
    """The steps of a sum over time that begins anew from each slice of its root: `h_t = x[:, t] + f(h_(t-1))`."""
    part, depends = chain.parts[0], chain.sums.dependence
    sums = {n: s for n in part.nodes if isinstance(s := chain.sums.states[n], Extended)}
    if len(chain.parts) > 1 or len(part.terms) > 1 or len(sums) < 2:
        return {}
    order = list(sums)
    if not all(depends.at_all(later, earlier) for earlier, later in pairwise(order)):
        return {}
    begun = [n for n in part.nodes if len(chain.sums.terms(n)) > 1]
    for steps in (order, order[1:]):  # the first may begin in its own way
        taken = {n: (sums[n].state, sums[n].addend) for n in steps}
        found = slices.over_time(taken, begun, part.root) if len(steps) > 1 else {}
        if found.keys() >= set(steps) and found:
            return found
    return {}


def _refuse_width(stream: RootStates) -> Refusal:
    dimension, because = stream.features.dimension, stream.features.because
    if stream.features.contradiction:
        said = (f"in dimension {d} for {describe(node)}" for d, node in stream.features.contradiction)
        why = f"its features are {' and '.join(said)}, and nothing decides between them"
    elif dimension == LAST:
        why = "its last dimension has no fixed size, so a query has no width"
    else:
        told = f" ({describe(because)} works on it)" if because is not None else ""
        why = f"its features are in dimension {dimension}{told}, which has no fixed size, so a query has no width"
    return Refusal("width", describe(stream.root), why)


def _without_tables(chains: list[StreamChain], sums: FormalSums) -> list[StreamChain]:
    """The streams that an input comes into; others are tables, made of parameters alone: positions resized, say.

    A graph without inputs makes all it has of parameters.
    """
    data = find_data(sums.nodes)
    values = [[v for p in c.parts for v in (p.root, *map(sums.addend, p.terms))] for c in chains]
    return [c for c, written in zip(chains, values, strict=True) if not data or not data.isdisjoint(written)]


def _roots(sums: FormalSums) -> list[Node]:
    return [n for n, s in sums.states.items() if isinstance(s, Root)]
