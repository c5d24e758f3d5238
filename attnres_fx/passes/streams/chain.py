"""The states of one or several roots as one stream: sublayers counted, reads placed between them."""

from collections.abc import Callable, Iterable

from torch.fx import Node

from attnres_fx.passes.graph.module_paths import module_path
from attnres_fx.passes.graph.operations import is_dropout, is_light, may_be_in_norm
from attnres_fx.passes.streams.consumer import consumer_path
from attnres_fx.passes.streams.formal_sum import Extended, Mapped
from attnres_fx.passes.streams.makers import made_by, part_of
from attnres_fx.passes.streams.places import Places
from attnres_fx.passes.streams.root_states import RootRead, RootStates
from attnres_fx.passes.streams.stream import Read, Stream, Term
from attnres_fx.passes.streams.work import work_of


class StreamChain:
    """One stream: the states of one root, or those of all the roots that the norms of a post-norm stream make."""

    def __init__(self, parts: tuple[RootStates, ...]) -> None:
        self.parts = parts
        self.sums = parts[0].sums
        self.post_norm = len(parts) > 1

    @property
    def num_sublayers(self) -> int:
        """How many terms the stream has after its root."""
        return sum(len(p.terms) for p in self.parts)

    def computes_inside(self, node: Node) -> bool:
        """Whether a node is part of what a sublayer computes: it depends on the root, and a term depends on it."""
        roots = {p.root for p in self.parts}
        if self.sums.root.get(node) in roots:
            return False
        written = {a for p in self.parts for t in p.terms if (a := self.sums.addend(t)) is not None}
        return _reach(node, lambda n: n.users, written) and _reach(
            node, lambda n: n.all_input_nodes, {self.parts[0].root}
        )

    def work(self) -> dict[Node, float]:
        """What its sublayers do beyond elementwise work, norms and reductions, and how much each of that is."""
        depends, root = self.sums.dependence, self.parts[0].root
        states = {n for p in self.parts for n in p.nodes}
        stack = [a for p in self.parts for t in p.terms if (a := self.sums.addend(t)) is not None]
        seen = set(states)
        while stack:
            node = stack.pop()
            if node not in seen and depends.at_all(node, root):
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return {n: work_of(n) for n in seen - states if not may_be_in_norm(n)}

    def to_stream(self) -> Stream:
        """The stream as plain data, without a name; its reads have that of the module that consumes them, if any."""
        chain = (self.parts[0].root, *(t for p in self.parts for t in p.terms))
        depths = {t: i for i, t in enumerate(chain)}
        reads = self._chain_reads()
        prefixes = [_prefix(self._seen(part, read), chain) for part, read in reads]
        cuts = sorted({1, len(chain), *prefixes})
        sublayer = {t: sum(cut <= depths[t] for cut in cuts) - 1 for t in chain[1:]}
        places = Places(chain[1:])
        terms = [self._term(t, sublayer[t], places) for t in chain[1:]]
        known = set(chain)
        named = []
        for (part, read), prefix in zip(reads, prefixes, strict=True):
            extra = [t for t in self._seen(part, read) if depths.get(t, len(chain)) >= prefix]
            terms += [self._term(t, None, places) for t in extra if t not in known]
            known.update(extra)
            line = places.of_read(self._first(read), (self._sum(read.core), *chain[prefix : prefix + 1]))
            named.append(self._read(read, cuts.index(prefix), tuple(t.name for t in extra), line))
        width = self.parts[0].fixed_width
        dimension = self.parts[0].features.dimension
        assert width is not None
        root = self._root(places)
        made = made_by(self.parts[0].root, self.sums, {t.module for t in terms})
        return Stream("", root, tuple(terms), tuple(named), width, self.post_norm, dimension=dimension, made_by=made)

    def branch_paths(self) -> list[str]:
        """The modules that compute its sublayers, seen through what is done to their outputs element by element.

        A mask, a scale or a drop path that a model applies in train mode alone is no part of what they are called.
        """
        depends, roots = self.sums.dependence, {p.root for p in self.parts}
        stack = [a for p in self.parts for t in p.terms if (a := self.sums.addend(t)) is not None]
        seen, paths = set(stack), []
        while stack:
            node = stack.pop()
            if not (is_light(node) or is_dropout(node)):
                paths.append(module_path(node))
                continue
            fresh = [n for n in node.all_input_nodes if n not in seen and any(depends.is_branch(n, r) for r in roots)]
            seen.update(fresh)
            stack += fresh
        return paths

    def _chain_reads(self) -> list[tuple[RootStates, RootRead]]:
        """All reads; of a post-norm stream only the norms', since its other states are already normed."""
        pairs = [(p, r) for p in self.parts for r in p.reads]
        return [(p, r) for p, r in pairs if not self.post_norm or len(r.terms) > 1]

    def _seen(self, part: RootStates, read: RootRead) -> tuple[Node, ...]:
        before = self.parts[: self.parts.index(part)]
        if not before:
            return read.terms
        return (self.parts[0].root, *(t for p in before for t in p.terms), *read.terms[1:])

    def _first(self, read: RootRead) -> Node:
        return next(c for c in read.consumers if c in self.sums.live.returned)

    def _sum(self, state: Node) -> Node:
        """The sum that a state is a factor or a view of."""
        while isinstance(mapped := self.sums.states[state], Mapped):
            state = mapped.state
        return state

    def _root(self, places: Places) -> Term:
        node = self.parts[0].root
        return Term(node.name, node.name, -1, module_path(node), places.of_write(node))

    def _term(self, node: Node, sublayer: int | None, places: Places) -> Term:
        state = self.sums.states[node]
        assert isinstance(state, Extended)
        addend = state.addend
        return Term(
            addend.name,
            node.name,
            sublayer,
            module_path(addend),
            places.of_write(node),
            part_of(addend, self.sums.root[node], self.sums),
        )

    def _read(self, read: RootRead, position: int, extras: tuple[str, ...], line: str) -> Read:
        first = self._first(read)
        return Read(
            name="output" if first.op == "output" else consumer_path(first, read.site),
            state=read.core.name,
            site=read.site.name,
            position=position,
            extras=extras,
            consumers=tuple(c.name for c in read.consumers),
            module=consumer_path(first, read.site),
            line=line,
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
