"""The states that one root begins: its terms, and the places that read them."""

from dataclasses import dataclass

from torch.fx import Node

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.nodes import shape_of
from attnres_fx.passes.graph.operations import asks_only_metadata, is_norm_step, may_be_in_norm
from attnres_fx.passes.streams.dependence import reaches_results
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Merged, Root


@dataclass
class RootRead:
    """A place that reads a state of one root.

    Args:
        core: The node that holds the sum.
        site: The node whose value the read replaces: the sum, or the last row map of it that all consumers share.
        consumers: What takes it in, in graph order.
        terms: The terms of the sum, the root among them.
    """

    core: Node
    site: Node
    consumers: tuple[Node, ...]
    terms: tuple[Node, ...]


class RootStates:
    """The states of one root: its chain and the places that consume it.

    Attributes:
        nodes: The states, in graph order.
        chain: The root and the terms of its longest sum.
        terms: The chain without the root.
        reads: The places that read a state, in graph order; what ends in a buffer alone makes none.
        features: Which dimension of the root holds its features.
        fixed_width: D, the size of that dimension; None where it is free.
    """

    def __init__(self, sums: FormalSums, root: Node) -> None:
        self.sums = sums
        self.root = root
        self.nodes = sorted(sums.of_stream(root))
        self.chain = self._chain()
        self.reads = self._reads()
        self.chain = self._in_order_of_reads()
        self.terms = self.chain[1:]
        self.features = sums.features.verdict(root)
        width = shape_of(root)[self.features.dimension]
        self.fixed_width = width if isinstance(width, int) else None

    def carried(self) -> list[Node]:
        """The states without those that something beside the chain was added to: what a sublayer adds on its way in."""
        chain = set(self.chain)
        beside: set[Node] = set()
        for node in self.nodes:
            added = isinstance(self.sums.states[node], Extended) and node not in chain
            if added or not beside.isdisjoint(self.sums.parents(node)):
                beside.add(node)
        return [n for n in self.nodes if n not in beside]

    def _chain(self) -> tuple[Node, ...]:
        """The terms of the state that has most of them: the stream itself, as opposed to side states.

        Of several, one that the results take in by another way than through the terms of another stream.
        """
        sums = [n for n in self.nodes if isinstance(self.sums.states[n], Extended | Merged)]
        terms = {n: self.sums.terms(n) for n in sums}
        most = max(map(len, terms.values()), default=0)
        longest = [n for n in sums if len(terms[n]) == most]
        if len({terms[n] for n in longest}) > 1:
            longest = [n for n in longest if reaches_results([n], self._is_sum_of_another)] or longest
        return terms[longest[-1]] if longest else (self.root,)

    def _is_sum_of_another(self, node: Node) -> bool:
        return isinstance(self.sums.states.get(node), Extended) and self.sums.root[node] is not self.root

    def _in_order_of_reads(self) -> tuple[Node, ...]:
        """The chain, so that every read sees a beginning of it, and no later term.

        Where a state beside the chain joins it later, its terms come after those that reads saw before it did. Terms
        that are read beside the chain as well are none of the chain: whatever sees them sees them as extras.
        """
        first = {t: i for i, read in reversed(list(enumerate(self.reads))) for t in read.terms}
        place = {t: (t is not self.root, first.get(t, len(self.reads)), i) for i, t in enumerate(self.chain)}
        chain = self.chain
        if any(_later_terms(chain, read.terms) for read in self.reads):
            chain = tuple(sorted(chain, key=place.__getitem__))
        for read in self.reads:
            if later := _later_terms(chain, read.terms):
                chain = tuple(t for t in chain if t not in later)
        return chain

    def _reads(self) -> list[RootRead]:
        consumers: dict[Node, list[tuple[Node, Node]]] = {}
        for state in self.nodes:
            for user in state.users:
                if not self._is_consumer(user, state):
                    continue
                consumers.setdefault(self._core(state), []).append((user, state))
        reads = [
            RootRead(
                core=core,
                site=self._site(core, [s for _, s in pairs]),
                consumers=tuple(sorted({u for u, _ in pairs})),
                terms=self.sums.terms(core),
            )
            for core, pairs in consumers.items()
            if any(u in self.sums.live.returned for u, _ in pairs)
        ]
        return sorted(reads, key=lambda r: r.core)

    def _is_consumer(self, user: Node, state: Node) -> bool:
        if asks_only_metadata(user, state) or user not in self.sums.live.observed:
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
        kinds = [self.sums.states[n].kind for n in shared[1:]]  # type: ignore[union-attr]
        if "detach" in kinds:  # what is stopped there stays stopped: the read stands before it
            shared = shared[: 1 + kinds.index("detach")]
        while len(shared) > 1 and self.sums.states[shared[-1]].kind in ("cast", "identity"):  # type: ignore[union-attr]
            shared.pop()
        return shared[-1] if shared else core

    def is_norm_to(self, read: RootRead, target: Node) -> bool:
        """Whether everything that consumes a read is a normalisation whose result is `target`."""
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
        alone = reached and all(c in inside for c in read.consumers)
        return alone and any(map(is_norm_step, inside)) and not self._adds_before_the_norm(inside)

    def _adds_before_the_norm(self, inside: set[Node]) -> bool:
        """Whether something of another origin is added to what a norm takes in: then it is the norm of another sum."""
        stack = [i for n in inside if is_norm_step(n) for i in n.all_input_nodes if i in inside]
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            addition = match_addition(node)
            if addition is not None and not all(self._is_of_root(o) for o in (addition.left, addition.right)):
                return True
            stack += [i for i in node.all_input_nodes if i in inside]
        return False

    def _is_of_root(self, node: Node) -> bool:
        return node is self.root or self.sums.dependence.at_all(node, self.root)


def _later_terms(chain: tuple[Node, ...], seen: tuple[Node, ...]) -> set[Node]:
    """What is seen of a chain after the first of its terms that is not seen."""
    terms = set(seen)
    gap = next((i for i, term in enumerate(chain) if term not in terms), len(chain))
    return terms.intersection(chain[gap:])
