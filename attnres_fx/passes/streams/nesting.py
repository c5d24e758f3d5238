"""Which stream is computed inside another's sublayer, or added into it."""

from dataclasses import replace

from torch.fx import Node

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.nodes import describe
from attnres_fx.passes.graph.operations import asks_only_metadata
from attnres_fx.passes.streams.chain import StreamChain
from attnres_fx.passes.streams.formal_sum import Extended
from attnres_fx.passes.streams.refusals import Refusal
from attnres_fx.passes.streams.root_states import RootStates
from attnres_fx.passes.streams.stream import Stream


def nest_streams(streams: list[Stream], chains: list[StreamChain]) -> list[Stream]:
    """Say of each stream which other one computes it inside a sublayer.

    Args:
        streams: Streams with names.
        chains: The nodes of each.

    Returns:
        The streams with `nested_in`, in their order.
    """
    return [replace(s, nested_in=_enclosing(c, chains, streams)) for s, c in zip(streams, chains, strict=True)]


def _enclosing(chain: StreamChain, chains: list[StreamChain], streams: list[Stream]) -> str | None:
    """The stream one of whose sublayers the chain is computed in: it depends on that stream's root, and one
    of that stream's terms depends on it."""
    depends = chain.sums.dependence
    root = chain.parts[0].root
    for other, stream in zip(chains, streams, strict=True):
        if other is chain or not depends.at_all(root, other.parts[0].root):
            continue
        for part in other.parts:
            for term in part.terms:
                state = part.sums.states[term]
                if isinstance(state, Extended) and (state.addend is root or depends.at_all(state.addend, root)):
                    return stream.name
    return None


def injected_into(stream: RootStates, others: list[RootStates]) -> RootStates | None:
    """The stream in whose sublayers a value is only added in: an attention mask or bias shared by all layers.

    Later scores depend on it through earlier ones, so `scores + mask` looks like a residual. But nothing reads
    it by itself, and what it is added to comes from the states of a stream that it does not depend on.

    Args:
        stream: The states of the value, which looks like the root of a stream.
        others: The states of every root of the graph.

    Returns:
        The states it is added inside of; None where it is the root of a stream of its own.
    """
    met = _added_to(stream)
    inside = (o for o in others if o is not stream and _computes(o, met, stream))
    return next(inside, None) if met else None


def _added_to(stream: RootStates) -> list[Node]:
    """What a root is added to while it is the only term; nothing where it is used in any other way."""
    alone = {n for n in stream.nodes if stream.sums.terms(n) == (stream.root,)}
    uses = [(u, n) for n in alone for u in n.users if u not in alone and not asks_only_metadata(u, n)]
    additions = [(match_addition(user), state) for user, state in uses]
    met = [a.right if a.left is state else a.left for a, state in additions if a is not None]
    return met if len(met) == len(additions) else []


def _computes(outer: RootStates, met: list[Node], inner: RootStates) -> bool:
    """Whether a stream that a root does not depend on computes what the root is added to, and takes in the sums."""
    depends = inner.sums.dependence
    if depends.at_all(inner.root, outer.root) or not all(depends.at_all(n, outer.root) for n in met):
        return False
    addends = (inner.sums.addend(t) for t in outer.terms)
    return any(a is not None and depends.at_all(a, inner.root) for a in addends)


def refuse_injected(stream: RootStates, into: RootStates) -> Refusal:
    """The refusal of a root that is added inside the sublayers of another's stream."""
    where = f"it is added inside the sublayers of the stream from {describe(into.root)}, and carries nothing on"
    return Refusal("injected", describe(stream.root), where)


def allow_inside_sublayers(refused: list[tuple[Node, Refusal]], chains: list["StreamChain"]) -> list[Refusal]:
    """A refusal stops a conversion, unless what it is about stands inside one sublayer of a stream.

    A chain of one sublayer that holds many of them is no stream around them but a skip over them all.

    Args:
        refused: What was refused, each with the node that it is about.
        chains: All streams of the graph.

    Returns:
        The refusals in their order; those inside a sublayer stop no conversion.
    """
    inside = {c: [n for n, r in refused if r.stops_conversion and c.computes_inside(n)] for c in chains}
    harmless = {n for c, nodes in inside.items() if c.num_sublayers > 1 or len(nodes) < 3 for n in nodes}
    kept = []
    for node, refusal in refused:
        if node in harmless:
            reason = f"{refusal.reason} (inside a sublayer, left as it is)"
            refusal = replace(refusal, stops_conversion=False, reason=reason)
        kept.append(refusal)
    return kept
