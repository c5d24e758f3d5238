"""Post-norm streams: the states of several roots, each the norm of the sum before it, as one stream."""

from torch.fx import Node

from attnres_fx.passes.graph.nodes import same_shape
from attnres_fx.passes.streams.root_states import RootRead, RootStates


def link_post_norm(roots: list[RootStates]) -> list[list[RootStates]]:
    """Chains of roots: where the only sum of one is read by a norm, and that norm is the next root.

    Args:
        roots: The states of every root of a graph, in graph order.

    Returns:
        Each root in one chain; a chain of one is a pre-norm stream.
    """
    following: dict[Node, RootStates] = {}
    for states in roots:
        continued = {s.root for s in following.values()}
        found = continuation(states, [s for s in roots if s.root not in continued])
        if found is not None:
            following[states.root] = found
    continued = {s.root for s in following.values()}
    chains = []
    for head in (s for s in roots if s.root not in continued):
        chain = [head]
        while (after := following.get(chain[-1].root)) is not None:
            chain.append(after)
        chains += _with_last_norm(chain)
    return chains


def continuation(states: RootStates, candidates: list[RootStates]) -> RootStates | None:
    """The first candidate whose root is the norm that reads the only sum of a root."""
    read = _read_of_only_sum(states)
    if read is None:
        return None
    return next((c for c in candidates if c.root > read.core and _norms(states, read, c.root)), None)


def _norms(states: RootStates, read: RootRead, root: Node) -> bool:
    """Whether a root is the norm of a read, row by row.

    Where heads are joined between them, or rows become columns, two streams meet.
    """
    features = states.sums.features
    same_rows = same_shape(read.core, root) and features.dimension(read.core) == features.dimension(root)
    return same_rows and states.is_norm_to(read, root)


def _read_of_only_sum(states: RootStates) -> RootRead | None:
    reads = [r for r in states.reads if len(r.terms) > 1]
    return reads[0] if len(reads) == 1 else None


def _with_last_norm(chain: list[RootStates]) -> list[list[RootStates]]:
    """Split off a last element that is a pre-norm stream of its own, standing on a norm's output."""
    if len(chain) == 1:
        return [chain]
    last = chain[-1]
    read = _read_of_only_sum(last)
    if read is not None and _reads_by_norm_alone(last, read):
        return [chain]
    return [chain[:-1], [last]] if len(chain) > 2 else [[s] for s in chain]


def _reads_by_norm_alone(stream: RootStates, read: RootRead) -> bool:
    targets = {n for c in read.consumers for n in _downstream(c, 16)}
    return any(stream.is_norm_to(read, t) for t in sorted(targets))


def _downstream(node: Node, limit: int) -> list[Node]:
    found = [node]
    for current in found:
        if len(found) > limit:
            break
        found += [u for u in current.users if u not in found and u.op != "output"]
    return found[:limit]
