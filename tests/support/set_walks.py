"""What stages need and send, walked with sets: from the definitions of the variants, not from the library."""


def needs_of_reads(variant, blocks, root="root"):
    """Per sublayer of a stream, what its stage must have: sets of terms that are summed, a word for root and summary.

    Written from the definition of the variants; the last read, and in `local` those at a block's end, run with the
    sublayer before them.
    """
    count = blocks[-1].stop
    summaries = {b.start: ("summary", n) if n else root for n, b in enumerate(blocks)}
    needs = [set() for _ in range(count)]
    for position in range(1, count + 1):
        here = next(b for b in blocks if b.start < position <= b.stop)
        ends = position == here.stop
        owner = position - 1 if position == count or (variant == "local" and ends) else position
        if variant == "full":
            seen = {root, *(frozenset([i]) for i in range(position))}
        elif variant == "block":
            seen = {root, *(frozenset(b) for b in blocks if b.stop <= position), frozenset(range(here.start, position))}
        else:
            seen = {summaries[here.start], *(frozenset([i]) for i in range(here.start, position))}
            if ends and position < count:
                needs[position].add(("summary", blocks.index(here) + 1))
        needs[owner] |= seen
    return needs


def maker_of(thing, blocks):
    if thing == "root":
        return 0
    if isinstance(thing, tuple):
        return blocks[thing[1]].start - 1
    return max(thing)


def walk(values, num_stages, virtual_stages, *, seen_at_start, forget):
    """Stage after stage with a set per rank of what it has seen: what crosses each hop, and what each rank holds.

    seen_at_start: whether a rank has seen what it makes. forget: every hop carries what any later stage needs.
    """
    stages = num_stages * virtual_stages
    seen = [set() for _ in range(num_stages)]
    held = [set() for _ in range(num_stages)]
    crossing = []
    for stage in range(stages):
        rank, following = stage % num_stages, (stage + 1) % num_stages
        made = {v.name for v in values if v.produced == stage}
        held[rank] |= made
        if seen_at_start:
            seen[rank] |= made
        if stage == stages - 1:
            break
        sent = set()
        for v in values:
            waiting = [u for u in v.used if u > stage and (forget or v.name not in seen[u % num_stages])]
            if v.produced <= stage and waiting and (forget or v.name not in seen[following]):
                assert forget or v.name in held[rank], "a rank can send only what it has"
                sent.add(v.name)
        crossing.append(sent)
        seen[following] |= sent
        held[following] |= sent
    return crossing, held
