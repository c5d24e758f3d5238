"""Formal sums as residual streams: root, terms, reads, and what was left alone and why.

The result is data. Nodes are named, not held, so that two analyses can be compared and printed; the
rewrite looks the names up again in the graph it was made from.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from attnres_fx.errors import StreamNameError
from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.nodes import describe, module_path, shape_of, source_line
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import asks_only_metadata, has_trait, is_norm_step, may_be_in_norm, op_name
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Merged, Root, find_formal_sums
from attnres_fx.passes.streams.refusals import Refusal, find_refusals


@dataclass(frozen=True)
class Term:
    """A value written into a stream.

    node: what holds the value. written_by: the addition that writes it (the value itself for the root).
    sublayer: index of the sublayer it belongs to; -1 for the root, None for a term outside the chain.
    """

    node: str
    written_by: str
    sublayer: int | None
    module: str
    line: str


@dataclass(frozen=True)
class Read:
    """A place where a state is consumed by something that is not part of the sum.

    state: the node that holds the sum. site: the node whose value the read replaces, the state itself or
        the last row map that all consumers share. position: sublayers written before it. extras: terms
        it sees that the chain does not go on with. consumers: the nodes that consume it.
    """

    name: str
    state: str
    site: str
    position: int
    extras: tuple[str, ...]
    consumers: tuple[str, ...]
    module: str
    line: str

    @property
    def sees_only_root(self) -> bool:
        return self.position == 0 and not self.extras


@dataclass(frozen=True)
class Stream:
    """One residual stream.

    width: D, the size of the last dimension. post_norm: whether a norm sits on the stream, so that every
        state has two terms and each norm reads. nested_in: the stream whose sublayer it is inside, if any.
    """

    name: str
    root: Term
    terms: tuple[Term, ...]
    reads: tuple[Read, ...]
    width: int
    post_norm: bool = False
    nested_in: str | None = None

    @property
    def num_sublayers(self) -> int:
        return 1 + max((t.sublayer for t in self.terms if t.sublayer is not None), default=-1)

    @property
    def depth_reads(self) -> tuple[Read, ...]:
        """The reads that get an operator: all that see more than the root."""
        return tuple(r for r in self.reads if not r.sees_only_root)


@dataclass(frozen=True)
class StreamSet:
    """All streams of one graph, what looked like one and was refused, and the sums they were read from."""

    streams: tuple[Stream, ...]
    refusals: tuple[Refusal, ...]
    sums: FormalSums = field(compare=False, repr=False)

    def select(self, wanted: str | Sequence[str]) -> tuple[Stream, ...]:
        """`"main"`, `"all"`, or streams by name. Raises StreamNameError for a name that does not exist."""
        if wanted == "all":
            return self.streams
        if wanted == "main":
            return tuple(s for s in self.streams if s.nested_in is None)
        names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        known = [s.name for s in self.streams]
        for name in names:
            if name not in known:
                raise StreamNameError(
                    f"streams={wanted!r}: there is no stream {name!r}. This model has "
                    f"{', '.join(map(repr, known)) or 'none'}; 'main' and 'all' also work."
                )
        return tuple(s for s in self.streams if s.name in names)


def find_streams(graph: Graph) -> StreamSet:
    """Every residual stream of a graph without mutations, with values on its nodes."""
    sums = find_formal_sums(graph)
    raw = [_RawStream(sums, root) for root in _roots(sums)]
    raw = [s for s in raw if s.terms]
    injected = {s: into for s in raw if (into := _injected_into(s, raw)) is not None}
    raw = [s for s in raw if s not in injected]
    fixed = [s for s in raw if s.fixed_width is not None and s.channels_first is None]
    refusals = [_refuse_injected(s, into) for s, into in injected.items()]
    refusals += [_refuse_width(s) for s in raw if s not in fixed]
    chains = _link_post_norm(fixed)
    found = [_Chain(tuple(chain)) for chain in chains]
    streams = _named([c.to_stream() for c in found])
    streams = _with_nesting(streams, found)
    refusals += _unless_inside(find_refusals(graph, sums), found)
    refusals += _interruptions(streams, found)
    return StreamSet(tuple(streams), tuple(refusals), sums)


def _unless_inside(refused: list[tuple[Node, Refusal]], chains: list["_Chain"]) -> list[Refusal]:
    """A refusal stops a conversion, unless what it is about goes on inside one sublayer of a stream.

    A chain of one sublayer that holds many of them is no stream around them but a skip over them all.
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


def _interruptions(streams: Sequence[Stream], chains: Sequence["_Chain"]) -> list[Refusal]:
    """Where one stream ends only because something is done to it that is neither sum, factor nor view."""
    ending = {n: s for s, c in zip(streams, chains, strict=True) for p in c.parts for n in p.nodes}
    refusals = []
    for stream, chain in zip(streams, chains, strict=True):
        root = chain.parts[0].root
        before = next((ending[n] for n in root.all_input_nodes if n in ending), None)
        if before is None or before is stream or stream.nested_in == before.name:
            continue
        why = (
            f"{before.name!r} ends here and {stream.name!r} begins, because {op_name(root)!r} is no sum, factor or "
            f"view of rows: reads after it do not reach what was written before"
        )
        refusals.append(Refusal("interrupted", describe(root), why))
    return refusals


def _roots(sums: FormalSums) -> list[Node]:
    return [n for n, s in sums.states.items() if isinstance(s, Root)]


@dataclass
class _RawRead:
    core: Node
    site: Node
    consumers: tuple[Node, ...]
    terms: tuple[Node, ...]


class _RawStream:
    """The states of one root: its chain and the places that consume it."""

    def __init__(self, sums: FormalSums, root: Node) -> None:
        self.sums = sums
        self.root = root
        self.nodes = sorted(sums.of_stream(root), key=sums.order.__getitem__)
        self.chain = self._chain()
        self.terms = self.chain[1:]
        self.reads = self._reads()
        width = shape_of(root)[-1]
        self.fixed_width = width if isinstance(width, int) else None
        self.channels_first = self._find_channels_first()

    def _chain(self) -> tuple[Node, ...]:
        """The terms of the state that has most of them: the stream itself, as opposed to side states."""
        sums = [n for n in self.nodes if isinstance(self.sums.states[n], Extended | Merged)]
        terms = [self.sums.terms(n) for n in sums]
        return max(reversed(terms), key=len, default=(self.root,))

    def _reads(self) -> list[_RawRead]:
        consumers: dict[Node, list[tuple[Node, Node]]] = {}
        for state in self.nodes:
            for user in state.users:
                if not self._is_consumer(user, state):
                    continue
                consumers.setdefault(self._core(state), []).append((user, state))
        order = self.sums.order
        reads = [
            _RawRead(
                core=core,
                site=self._site(core, [s for _, s in pairs]),
                consumers=tuple(sorted({u for u, _ in pairs}, key=order.__getitem__)),
                terms=self.sums.terms(core),
            )
            for core, pairs in consumers.items()
        ]
        return sorted(reads, key=lambda r: order[r.core])

    def _is_consumer(self, user: Node, state: Node) -> bool:
        if asks_only_metadata(user, state):
            return False
        known = user in self.sums.states and self.sums.root[user] is self.root
        if not known or isinstance(self.sums.states[user], Root):
            return True
        return state not in self.sums.parents(user)

    def _core(self, state: Node) -> Node:
        return self.sums.row_map_path(state)[0]

    def _site(self, core: Node, states: list[Node]) -> Node:
        paths = [self.sums.row_map_path(s) for s in states]
        shared = [step[0] for step in zip(*paths, strict=False) if all(n is step[0] for n in step)]
        while len(shared) > 1 and self.sums.states[shared[-1]].kind in ("cast", "identity"):  # type: ignore[union-attr]
            shared.pop()
        return shared[-1] if shared else core

    def _find_channels_first(self) -> Node | None:
        users = (u for n in self.nodes if len(shape_of(n)) > 2 for u in n.users)
        return next((u for u in users if has_trait(u, Trait.CHANNELS_FIRST)), None)

    def is_norm_to(self, read: _RawRead, target: Node) -> bool:
        """Whether everything that consumes a read is a normalisation whose result is `target`."""
        assert self.sums.dependence is not None
        inside: set[Node] = set()
        stack = [target]
        reached = False
        while stack:
            node = stack.pop()
            if node in inside:
                continue
            if node in self.sums.states and self.sums.root[node] is self.root and self._core(node) is read.core:
                reached = True
                continue
            if not self.sums.dependence.at_all(node, self.root) and node is not self.root:
                continue
            if node is self.root or not may_be_in_norm(node) or len(inside) > 64:
                return False
            inside.add(node)
            stack.extend(node.all_input_nodes)
        return reached and any(map(is_norm_step, inside)) and all(c in inside for c in read.consumers)


def _injected_into(stream: _RawStream, others: list[_RawStream]) -> _RawStream | None:
    """The stream in whose sublayers a value is only added in: an attention mask or bias shared by all layers.

    Later scores hang on it through earlier ones, so `scores + mask` looks like a residual. But nothing reads
    it by itself, and what it is added to comes from the states of a stream that it does not hang on.
    """
    depends = stream.sums.dependence
    assert depends is not None
    alone = {n for n in stream.nodes if stream.sums.terms(n) == (stream.root,)}
    met: list[Node] = []
    for user, state in ((u, n) for n in alone for u in n.users if u not in alone and not asks_only_metadata(u, n)):
        addition = match_addition(user)
        if addition is None:
            return None
        met.append(addition.right if addition.left is state else addition.left)
    for other in others:
        carried = (stream.sums.addend(t) for t in other.terms)
        if other is stream or depends.at_all(stream.root, other.root) or not met:
            continue
        if all(depends.at_all(n, other.root) for n in met) and any(
            c is not None and depends.at_all(c, stream.root) for c in carried
        ):
            return other
    return None


def _refuse_injected(stream: _RawStream, into: _RawStream) -> Refusal:
    where = f"it is added inside the sublayers of the stream from {describe(into.root)}, and carries nothing on"
    return Refusal("injected", describe(stream.root), where)


def _link_post_norm(raw: list[_RawStream]) -> list[list[_RawStream]]:
    """Chains of streams whose only sum is read by a norm that is the next one's root."""
    by_root = {s.root: s for s in raw}
    following: dict[Node, _RawStream] = {}
    continued: set[Node] = set()
    for stream in raw:
        reads = [r for r in stream.reads if len(r.terms) > 1]
        if len(reads) != 1:
            continue
        later = [s for s in raw if s.sums.order[s.root] > s.sums.order[reads[0].core]]
        for candidate in later:
            if candidate.root in continued:
                continue
            if stream.is_norm_to(reads[0], candidate.root):
                following[stream.root] = candidate
                continued.add(candidate.root)
                break
    heads = [s for s in raw if s.root not in {f.root for f in following.values()}]
    chains = []
    for head in heads:
        chain = [head]
        while chain[-1].root in following:
            chain.append(by_root[following[chain[-1].root].root])
        chains.append(_with_last_norm(chain))
    return [part for chain in chains for part in chain]


def _with_last_norm(chain: list[_RawStream]) -> list[list[_RawStream]]:
    """Split off a last element that is a pre-norm stream of its own, standing on a norm's output."""
    if len(chain) == 1:
        return [chain]
    last = chain[-1]
    reads = [r for r in last.reads if len(r.terms) > 1]
    if len(reads) == 1 and _reads_by_norm_alone(last, reads[0]):
        return [chain]
    return [chain[:-1], [last]] if len(chain) > 2 else [[s] for s in chain]


def _reads_by_norm_alone(stream: _RawStream, read: _RawRead) -> bool:
    targets = {n for c in read.consumers for n in _downstream(c, 16)}
    return any(stream.is_norm_to(read, t) for t in sorted(targets, key=stream.sums.order.__getitem__))


def _downstream(node: Node, limit: int) -> list[Node]:
    found = [node]
    for current in found:
        if len(found) > limit:
            break
        found += [u for u in current.users if u not in found and u.op != "output"]
    return found[:limit]


class _Chain:
    """One stream: a raw stream, or the raw streams between the norms of a post-norm one."""

    def __init__(self, parts: tuple[_RawStream, ...]) -> None:
        self.parts = parts
        self.sums = parts[0].sums
        self.post_norm = len(parts) > 1

    @property
    def num_sublayers(self) -> int:
        return sum(len(p.terms) for p in self.parts)

    def computes_inside(self, node: Node) -> bool:
        """Whether a node is part of what a sublayer computes: it hangs on the root, and a term on it."""
        roots = {p.root for p in self.parts}
        if self.sums.root.get(node) in roots:
            return False
        written = {a for p in self.parts for t in p.terms if (a := self.sums.addend(t)) is not None}
        return _reach(node, lambda n: n.users, written) and _reach(
            node, lambda n: n.all_input_nodes, {self.parts[0].root}
        )

    def to_stream(self) -> Stream:
        chain = (self.parts[0].root, *(t for p in self.parts for t in p.terms))
        depths = {t: i for i, t in enumerate(chain)}
        reads = self._chain_reads()
        prefixes = [_prefix(self._seen(part, read), chain) for part, read in reads]
        cuts = sorted({1, len(chain), *prefixes})
        sublayer = {t: sum(cut <= depths[t] for cut in cuts) - 1 for t in chain[1:]}
        terms = [self._term(t, sublayer[t]) for t in chain[1:]]
        known = set(chain)
        named = []
        for (part, read), prefix in zip(reads, prefixes, strict=True):
            extra = [t for t in self._seen(part, read) if depths.get(t, len(chain)) >= prefix]
            terms += [self._term(t, None) for t in extra if t not in known]
            known.update(extra)
            named.append(self._read(read, cuts.index(prefix), tuple(t.name for t in extra)))
        width = self.parts[0].fixed_width
        assert width is not None
        return Stream("", self._root(), tuple(terms), _unique_names(named), width, self.post_norm)

    def _chain_reads(self) -> list[tuple[_RawStream, _RawRead]]:
        """All reads; of a post-norm stream only the norms', since its other states are already normed."""
        pairs = [(p, r) for p in self.parts for r in p.reads]
        return [(p, r) for p, r in pairs if not self.post_norm or len(r.terms) > 1]

    def _seen(self, part: _RawStream, read: _RawRead) -> tuple[Node, ...]:
        before = self.parts[: self.parts.index(part)]
        if not before:
            return read.terms
        return (self.parts[0].root, *(t for p in before for t in p.terms), *read.terms[1:])

    def _root(self) -> Term:
        node = self.parts[0].root
        return Term(node.name, node.name, -1, module_path(node), source_line(node))

    def _term(self, node: Node, sublayer: int | None) -> Term:
        state = self.sums.states[node]
        assert isinstance(state, Extended)
        addend = state.addend
        return Term(addend.name, node.name, sublayer, module_path(addend), source_line(node))

    def _read(self, read: _RawRead, position: int, extras: tuple[str, ...]) -> Read:
        first = read.consumers[0]
        name = "output" if first.op == "output" else module_path(first) or first.name
        return Read(
            name=name,
            state=read.core.name,
            site=read.site.name,
            position=position,
            extras=extras,
            consumers=tuple(c.name for c in read.consumers),
            module=module_path(first),
            line=source_line(first) or source_line(read.core),
        )


def _reach(start: Node, step: Callable[[Node], Iterable[Node]], goals: set[Node]) -> bool:
    """Whether a walk along a graph comes to one of its goals."""
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        if node in goals:
            return True
        fresh = [n for n in step(node) if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return False


def _prefix(seen: Iterable[Node], chain: tuple[Node, ...]) -> int:
    terms = set(seen)
    return next((i for i, t in enumerate(chain) if t not in terms), len(chain))


def _unique_names(reads: list[Read]) -> tuple[Read, ...]:
    """Number the repeats of a name; the read that sees only the root has no parameters and no number."""
    seen: Counter[str] = Counter()
    result = []
    for read in reads:
        if not read.sees_only_root:
            seen[read.name] += 1
            if seen[read.name] > 1:
                read = replace(read, name=f"{read.name}#{seen[read.name]}")
        result.append(read)
    return tuple(result)


def _named(streams: list[Stream]) -> list[Stream]:
    """Name each stream after the module path its terms and reads share; keep read names apart too."""
    seen: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    named = []
    for stream in streams:
        paths = [p for p in (*(t.module for t in stream.terms), *(r.module for r in stream.depth_reads)) if p]
        base = _common_path(paths) or "stream"
        seen[base] += 1
        reads = []
        for read in stream.reads:
            if not read.sees_only_root:
                plain = read.name.split("#")[0]
                taken[plain] += 1
                read = replace(read, name=plain if taken[plain] == 1 else f"{plain}#{taken[plain]}")
            reads.append(read)
        named.append(replace(stream, name=base if seen[base] == 1 else f"{base}#{seen[base]}", reads=tuple(reads)))
    return named


def _common_path(paths: Sequence[str]) -> str:
    split = [p.split(".") for p in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _with_nesting(streams: list[Stream], chains: list[_Chain]) -> list[Stream]:
    return [replace(s, nested_in=_enclosing(c, chains, streams)) for s, c in zip(streams, chains, strict=True)]


def _enclosing(chain: _Chain, chains: list[_Chain], streams: list[Stream]) -> str | None:
    """The stream one of whose sublayers the chain is computed in: it hangs on that stream's root, and one
    of that stream's terms hangs on it."""
    depends = chain.sums.dependence
    assert depends is not None
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


def _refuse_width(stream: _RawStream) -> Refusal:
    if stream.channels_first is not None:
        why = f"its features are not in the last dimension: {describe(stream.channels_first)} works on dimension 1"
    else:
        why = "its last dimension has no fixed size, so a query has no width"
    return Refusal("width", describe(stream.root), why)
