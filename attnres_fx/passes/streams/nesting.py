"""Which stream is computed inside another's sublayer, or added into it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch.fx import Node

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.nodes import describe
from attnres_fx.passes.graph.operations import asks_only_metadata
from attnres_fx.passes.streams.chain import StreamChain
from attnres_fx.passes.streams.dependence import reaches_results
from attnres_fx.passes.streams.formal_sum import Extended
from attnres_fx.passes.streams.post_norm import continuation
from attnres_fx.passes.streams.refusals import Refusal, carried_on
from attnres_fx.passes.streams.root_states import RootStates
from attnres_fx.passes.streams.stream import Stream


@dataclass(frozen=True)
class Nesting:
    """Which streams of a graph stand inside others, by their index.

    Attributes:
        nested_in: By stream that is computed inside a sublayer, the stream of that sublayer.
        around: By stream that does less than what stands inside its sublayer, the largest of what stands there.
    """

    nested_in: Mapping[int, int]
    around: Mapping[int, int]

    def is_main(self, index: int) -> bool:
        """Whether a stream is inside no other, and goes around none that does more."""
        return index not in self.nested_in and index not in self.around


def find_nesting(streams: Sequence[Stream], chains: Sequence[StreamChain]) -> Nesting:
    """Find which stream computes which other one inside a sublayer, and which one goes around a larger one.

    Where one stands inside another, the one with the computation is the main one, if it is no shallower: a skip from
    end to end around a stack of layers does less by itself than what it goes around.

    Args:
        streams: The streams of a graph; their names do not matter.
        chains: The nodes of each.

    Returns:
        Where each stands.
    """
    numbers = range(len(chains))
    inside = {(o, i): how for i in numbers for o in numbers if (how := _inside(chains[o], chains[i], streams[i]))}
    around = _skips_around(chains, streams, [pair for pair, how in inside.items() if how == "one sublayer"])
    nested: dict[int, int] = {}
    for outer, inner in inside:
        if outer not in around:
            nested.setdefault(inner, outer)
    return Nesting(nested, around)


def nest_streams(streams: Sequence[Stream], nesting: Nesting) -> list[Stream]:
    """Say of each stream, by name, which other one computes it inside a sublayer, or which one it goes around."""
    return [
        replace(
            stream,
            nested_in=streams[nesting.nested_in[i]].name if i in nesting.nested_in else None,
            around=streams[nesting.around[i]].name if i in nesting.around else None,
        )
        for i, stream in enumerate(streams)
    ]


def _skips_around(
    chains: Sequence[StreamChain], streams: Sequence[Stream], inside: list[tuple[int, int]]
) -> dict[int, int]:
    """The streams that do less than those in their sublayers, and are no deeper, each with the largest of them."""
    work = {i: chains[i].work() for pair in inside for i in pair}
    found: dict[int, int] = {}
    for outer in {o for o, _ in inside}:
        inner = [i for o, i in inside if o == outer]
        within = {node: count for i in inner for node, count in work[i].items()}
        own = sum(count for node, count in work[outer].items() if node not in within)
        deep = [i for i in inner if streams[i].num_sublayers >= streams[outer].num_sublayers]
        if deep and own < sum(within.values()):
            found[outer] = max(deep, key=lambda i: sum(work[i].values()))
    return found


def _inside(outer: StreamChain, inner: StreamChain, stream: Stream) -> Literal["", "one sublayer", "sublayers"]:
    """Whether one stream is computed inside a sublayer of another, or of several.

    Its sublayers depend on the other stream, and a term of that depends on it. If nothing of it depends on that term it
    is inside one sublayer. Lanes that read each other layer by layer stand side by side; but one value that is made in
    a sublayer and added to once in each later one is no lane, unless a result is made of the sum. `stream` is the
    inner one with its sublayers counted: terms that no read separates are one.
    """
    depends, root = inner.sums.dependence, inner.parts[0].root
    if outer is inner:
        return ""
    addends = [a for p in inner.parts for t in p.terms if (a := inner.sums.addend(t)) is not None]
    if not any(depends.at_all(a, outer.parts[0].root) for a in addends):
        return ""
    terms = [t for p in outer.parts for t in p.terms]
    first = _first_term_with(outer, terms, root)
    if first is None:
        return ""
    begins_inside = depends.at_all(root, outer.parts[0].root)
    if any(a is first or depends.at_all(a, first) for a in addends):
        return "sublayers" if begins_inside and stream.num_sublayers == 1 and not _goes_past(inner, terms) else ""
    return "one sublayer" if begins_inside or not _goes_past(inner, [first]) else ""


def _first_term_with(outer: StreamChain, terms: Collection[Node], root: Node) -> Node | None:
    """The first term of a stream that is computed with a root."""
    depends = outer.sums.dependence
    return next((t for t in terms if (a := outer.sums.addend(t)) and (a is root or depends.at_all(a, root))), None)


def _goes_past(inner: StreamChain, terms: Collection[Node]) -> bool:
    """Whether a stream reaches the results of a graph by another way than through these terms."""
    return reaches_results((n for p in inner.parts for n in p.nodes), set(terms).__contains__)


def injected_into(stream: RootStates, others: list[RootStates]) -> RootStates | None:
    """The stream in whose sublayers a value is only added in: an attention mask or bias shared by all layers.

    Later scores depend on it through earlier ones, so `scores + mask` looks like a residual. But what it is added to
    reads it in no other way, and comes from the states of a stream that it does not depend on.

    Args:
        stream: The states of the value, which looks like the root of a stream.
        others: The states of every root of the graph.

    Returns:
        The states it is added inside of; None where it is the root of a stream of its own.
    """
    met = _only_added_to(stream)
    if met:
        return next((o for o in others if o is not stream and _computes(o, met, stream)), None)
    if continuation(stream, others) is not None:
        return None
    return next((o for o in others if o is not stream and _takes_all_sums(o, stream)), None)


def _takes_all_sums(outer: RootStates, inner: RootStates) -> bool:
    """Whether all that one root is added to is computed from another stream, and written into it alone.

    `z = z - f(g(z) - y)` in every layer is one stream, of z, also where its z began as a projection of y.
    """
    depends, states = inner.sums.dependence, inner.sums.states
    added = [s for n in inner.nodes if isinstance(s := states[n], Extended)]
    if len(inner.terms) > 1 or depends.at_all(inner.root, outer.root):
        return False
    if not all(depends.at_all(s.addend, outer.root) for s in added):
        return False
    return not reaches_results((s.node for s in added), set(outer.terms).__contains__)


def _only_added_to(stream: RootStates) -> list[Node]:
    """What a root is added to while it is the only term; nothing where some of that reads the root by itself."""
    sums = stream.sums
    alone = {n for n in stream.nodes if sums.terms(n) == (stream.root,)}
    additions = {u: a for n in alone for u in n.users if u not in alone and (a := match_addition(u)) is not None}
    met = [a.right if a.left in alone else a.left for a in additions.values()]
    seen, stack = set(additions), list(met)
    while stack:
        node = stack.pop()
        if node in alone:
            return []
        if node in seen or not sums.dependence.at_all(node, stream.root):
            continue
        seen.add(node)
        stack += [n for n in node.all_input_nodes if not asks_only_metadata(node, n)]
    return met


def _computes(outer: RootStates, met: list[Node], inner: RootStates) -> bool:
    """Whether a stream that a root does not depend on computes what the root is added to, and takes in the sums."""
    depends = inner.sums.dependence
    if depends.at_all(inner.root, outer.root):
        return False
    if not all(n is outer.root or depends.at_all(n, outer.root) for n in met):
        return False
    addends = (inner.sums.addend(t) for t in outer.terms)
    return any(a is not None and depends.at_all(a, inner.root) for a in addends)


def refuse_injected(stream: RootStates, into: str) -> Refusal:
    """The refusal of a root that is added inside the sublayers of the stream of that name."""
    return Refusal(
        "injected", describe(stream.root), f"it is added inside the sublayers of {into!r}, and carries nothing on"
    )


def without_those_inside(refused: list[tuple[Node, Refusal]], chains: list["StreamChain"]) -> list[Refusal]:
    """What was refused, without what stands inside one sublayer of a stream: nobody would call that a stream.

    A chain that holds more of them, one carried on from another, than it has sublayers goes around them all.

    Args:
        refused: What was refused, each with the node that it is about.
        chains: All streams of the graph.
    """
    carries = carried_on([node for node, refusal in refused if refusal.stops_conversion])
    inside: set[Node] = set()
    for chain in chains:
        for cells in carries:
            held = [n for n in cells if chain.computes_inside(n)]
            if len(held) <= chain.num_sublayers:
                inside |= set(held)
    return [refusal for node, refusal in refused if node not in inside]
