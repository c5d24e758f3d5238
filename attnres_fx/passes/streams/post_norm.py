"""Post-norm streams: the states of several roots, each the norm of the sum before it, as one stream."""

from torch.fx import Node

from attnres_fx.passes.streams.root_states import RootRead, RootStates


def link_post_norm(raw: list[RootStates]) -> list[list[RootStates]]:
    """Chains of streams whose only sum is read by a norm that is the next one's root."""
    by_root = {s.root: s for s in raw}
    following: dict[Node, RootStates] = {}
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


def _with_last_norm(chain: list[RootStates]) -> list[list[RootStates]]:
    """Split off a last element that is a pre-norm stream of its own, standing on a norm's output."""
    if len(chain) == 1:
        return [chain]
    last = chain[-1]
    reads = [r for r in last.reads if len(r.terms) > 1]
    if len(reads) == 1 and _reads_by_norm_alone(last, reads[0]):
        return [chain]
    return [chain[:-1], [last]] if len(chain) > 2 else [[s] for s in chain]


def _reads_by_norm_alone(stream: RootStates, read: RootRead) -> bool:
    targets = {n for c in read.consumers for n in _downstream(c, 16)}
    return any(stream.is_norm_to(read, t) for t in sorted(targets, key=stream.sums.order.__getitem__))


def _downstream(node: Node, limit: int) -> list[Node]:
    found = [node]
    for current in found:
        if len(found) > limit:
            break
        found += [u for u in current.users if u not in found and u.op != "output"]
    return found[:limit]
