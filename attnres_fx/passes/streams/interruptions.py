"""Where one stream ends only because something is done to it that is neither sum, factor nor view of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from attnres_fx.passes.graph.nodes import describe, shape_of, sizes_agree
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import (
    asks_only_metadata,
    called_module,
    has_trait,
    is_light,
    is_norm_step,
    op_name,
)
from attnres_fx.passes.streams.chain import StreamChain
from attnres_fx.passes.streams.formal_sum import Extended
from attnres_fx.passes.streams.refusals import Refusal
from attnres_fx.passes.streams.stream import Stream


@dataclass(frozen=True)
class _Way:
    """How a value was computed from the last state of a stream.

    Args:
        stream: Index of the stream.
        state: The state.
        first: What was done to the state first, on the shortest way.
        length: How many operations stand on the shortest way.
        normed: Whether a norm stands on the way.
        projected: Whether a projection, an attention or a convolution does.
        read: Whether one stands behind a norm, as where a head or a sublayer reads the stream.
    """

    stream: int
    state: Node
    first: Node
    length: int = 0
    normed: bool = False
    projected: bool = False
    read: bool = False

    def begins_anew(self, root: Node) -> bool:
        """Whether a stream from `root` is one of its own by design: behind a norm and a projection, or of another
        width behind a projection."""
        return self.read or (self.projected and not sizes_agree(shape_of(self.state)[-1], shape_of(root)[-1]))


@dataclass(frozen=True)
class Interruption:
    """Where a stream goes on as another one.

    Attributes:
        before: Index of the stream that ends.
        after: Index of the one that begins.
        refusal: What the report says of it.
        normed: Whether a norm stands between the two.
        first: What is done first to the last state of the one that ends.
    """

    before: int
    after: int
    refusal: Refusal
    normed: bool
    first: Node


def find_interruptions(streams: Sequence[Stream], chains: Sequence[StreamChain]) -> list[Interruption]:
    """Where one stream ends and another goes on from it, whatever stands between the two.

    What begins behind a norm and a projection (a head, a decoder, the next stage of a hierarchical model), or behind a
    projection to another width, is a stream of its own; so is what goes on from a state that its stream goes on from.

    Args:
        streams: All streams of a graph, with `nested_in`.
        chains: The nodes of each.

    Returns:
        For each stream that begins where others end all of those; several that are joined there share what is said of
        them.
    """
    if len(chains) < 2:
        return []
    ways = _ways_from_ends(chains)
    interruptions: list[Interruption] = []
    for i, chain in enumerate(chains):
        root = chain.parts[0].root
        found = (w for w in ways.get(root, ()) if w.stream != i and not w.begins_anew(root))
        beside = (w for w in found if streams[w.stream].nested_in == streams[i].nested_in)
        ended = sorted((w for w in beside if not _encloses(chains[w.stream], chain)), key=lambda w: w.stream)
        for first in dict.fromkeys(w.first for w in ended):
            joined = [w for w in ended if w.first is first]
            refusal = _refusal(first, [streams[w.stream] for w in joined], streams[i])
            interruptions += [Interruption(w.stream, i, refusal, w.normed, first) for w in joined]
    return interruptions


def _ways_from_ends(chains: Sequence[StreamChain]) -> dict[Node, tuple[_Way, ...]]:
    """How the root of each stream was computed from the last states of others; states end all ways."""
    owner = {n: i for i, c in enumerate(chains) for p in c.parts for n in p.nodes}
    last = {n for c in chains for n in _last_states(c)}
    ways: dict[Node, tuple[_Way, ...]] = {}
    for node in chains[0].sums.nodes:
        found: dict[int, _Way] = {}
        for source in node.all_input_nodes:
            if asks_only_metadata(node, source):
                continue
            if source in last:
                arriving: tuple[_Way, ...] = (_Way(owner[source], source, node),)
            else:
                arriving = () if source in owner else ways.get(source, ())
            for way in arriving:
                found[way.stream] = _joined(found.get(way.stream), _gone_on(way, node))
        if found:
            ways[node] = tuple(found.values())
    return ways


def _last_states(chain: StreamChain) -> list[Node]:
    """The states that hold every term that a stream has."""
    part = chain.parts[-1]
    every = set(part.chain)
    return [n for n in part.nodes if n >= part.chain[-1] and every <= set(part.sums.terms(n))]


def _joined(known: _Way | None, way: _Way) -> _Way:
    """Two ways that meet: a norm written out has two, and a head reads the stream only if no way goes around it."""
    if known is None:
        return way
    return replace(
        min(known, way, key=lambda w: w.length),
        normed=known.normed or way.normed,
        projected=known.projected and way.projected,
        read=known.read and way.read,
    )


def _gone_on(way: _Way, node: Node) -> _Way:
    normed = way.normed or (is_norm_step(node) and (has_trait(node, Trait.NORM) or _reduces_rows(node, way.state)))
    projects = _projects(node)
    return replace(
        way,
        length=way.length + 1,
        normed=normed,
        projected=way.projected or projects,
        read=way.read or (projects and way.normed),
    )


def _reduces_rows(node: Node, state: Node) -> bool:
    """Whether a reduction leaves one number of each row, as the middle of a written-out norm does."""
    before, after = shape_of(state)[:-1], shape_of(node)
    kept = after[:-1] if len(after) > len(before) and after[-1] == 1 else after
    return len(before) == len(kept) and all(map(sizes_agree, before, kept))


def _projects(node: Node) -> bool:
    """Whether a node is a known operation that computes with weights or otherwise over more than single elements."""
    if is_light(node) or is_norm_step(node) or node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module":
        return True
    return "::" not in op_name(node) and has_trait(node, Trait.SAVES_INPUTS | Trait.MIXES | Trait.CHANNELS_FIRST)


def _encloses(outer: StreamChain, inner: StreamChain) -> bool:
    """Whether a stream's own terms are computed from another one: then it goes on around it."""
    depends, root = outer.sums.dependence, inner.parts[0].root
    states = (p.sums.states[t] for p in outer.parts for t in p.terms)
    addends = [s.addend for s in states if isinstance(s, Extended)]
    return any(a is root or depends.at_all(a, root) for a in addends)


def _refusal(first: Node, before: Sequence[Stream], after: Stream) -> Refusal:
    names = " and ".join(repr(s.name) for s in before)
    why = (
        f"{names} {'end' if len(before) > 1 else 'ends'} here and {after.name!r} begins, because {_called(first)!r} is "
        f"no sum, factor or view of rows: reads after it do not reach what was written before"
    )
    return Refusal("interrupted", describe(first), why)


def refuse_prelude(first: Node, after: str) -> Refusal:
    """The remark that a sum of one sublayer is taken as part of the root of the stream that begins after it.

    Args:
        first: What is done to the sum.
        after: The name of the stream.
    """
    why = (
        f"one sublayer before it is taken as part of the root of {after!r} and left as it is, because "
        f"{_called(first)!r} is no sum, factor or view of rows"
    )
    return Refusal("interrupted", describe(first), why)


def _called(node: Node) -> str:
    """What a node calls, as its user would say."""
    module = called_module(node) if node.op == "call_module" else None
    name = op_name(node)
    return type(module).__name__ if module is not None and name == "module" else name.removeprefix("higher_order::")
