"""Where to cut: stages, and blocks where they are free.

For given blocks and V = 1 the stages are the best there are, by dynamic programming (`cut_search`); for V > 1 they are
good ones, with a bound (`interleaved_search`). Free blocks are all tried where they are few. Where they are many, even
blocks are, the latest that are allowed (in `block` a read sees one source more for each block begun before it, so
nothing is faster than those), and blocks moved to where the stages of either begin.

Blocks that end where stages do keep a stage's work whole and its checkpoints readable, and even blocks are what the
model was designed with; neither shows in seconds. So among plans whose slowest stage is within `TOLERANCE` of the
fastest, aligned ones win, then those with the most even blocks, then `Partition.objective` decides.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.traffic import size
from attnres_fx.partition.planner.block_choices import all_blocks, block_sizes, count_blocks, latest_blocks
from attnres_fx.partition.planner.cut_search import NEVER, CutSearch
from attnres_fx.partition.planner.interleaved_search import InterleavedSearch, search_interleaved
from attnres_fx.partition.planner.objective import Partition, evaluate, units_of
from attnres_fx.partition.planner.request import PlanRequest, check_request
from attnres_fx.passes.schedule import even_starts

#: How much slower than the fastest plan one may be that is aligned, or has more even blocks: a share.
TOLERANCE = 0.02
#: Choices of blocks that are all tried, times sublayers times stages.
ENUMERATED = 60_000

#: By the start of the last block: how far all starts are from even ones, and the starts.
_BlockChoices = dict[int, tuple[int, tuple[int, ...]]]


@dataclass(frozen=True)
class _SearchResult:
    """What was found for given blocks.

    Args:
        best: The best plan that fits, or None.
        bound: Picoseconds the slowest stage takes at least.
        least_memory: A limit, in bytes a rank, that some plan meets; the smallest such for V = 1.
    """

    best: Partition | None
    bound: int
    least_memory: int


def find_partition(request: PlanRequest) -> Partition:
    """The stages, and the blocks where they are free, that are best under the rule at the head of this file.

    Raises PlanError where nothing fits, saying what to change.
    """
    check_request(request)
    results, exact = _search(request)
    plans = [r.best for r in results if r.best is not None]
    if not plans:
        raise _infeasible(request, _enough_memory(request, _least_memory(results)))
    bound = min(r.bound for r in results)
    best = preferred(plans)
    fastest = min(p.slowest for p in plans)
    return replace(best, gap=max(0.0, best.slowest / max(fastest if exact else bound, 1) - 1))


def _search(request: PlanRequest) -> tuple[list[_SearchResult], bool]:
    """What was found for each choice of blocks, and whether the best of it is the best there is."""
    exact = request.virtual_stages == 1
    if request.known_layouts is not None:
        return _both(request, request.known_layouts), exact
    if _is_small(request):
        return [f for s in _all_choices(request) for f in _both(request, s)], exact
    return list(_some_choices(request)), False


def _least_memory(results: Iterable[_SearchResult]) -> int:
    return min((r.least_memory for r in results), default=NEVER)


def _enough_memory(request: PlanRequest, least: int) -> int:
    """A limit under which a plan is found: for V > 1 the search goes other ways under other limits."""
    while request.memory_limit is not None and request.virtual_stages > 1 and least < NEVER:
        results, _ = _search(replace(request, memory_limit=least))
        if any(r.best is not None for r in results):
            break
        least = max(_least_memory(results), least + least // 50 + 1)
    return least


def preferred(plans: Iterable[Partition]) -> Partition:
    """The plan that the rule chooses: of those about as fast as the fastest, aligned, with even blocks, the best."""
    known = list(plans)
    limit = min(p.slowest for p in known) * (1 + TOLERANCE)
    return min((p for p in known if p.slowest <= limit), key=lambda p: (not p.aligned, unevenness(p), p.objective))


def unevenness(plan: Partition) -> int:
    """How much the longest block of a stream is longer than its shortest, where sizes differ by more than one."""
    sizes = [[len(b) for b in s.blocks] for _, s in plan.block_layouts if s.variant != "full"]
    return max((max(max(each) - min(each) - 1, 0) for each in sizes), default=0)


def _is_small(request: PlanRequest) -> bool:
    work = request.num_sublayers * request.num_virtual
    choices = sum(count_blocks(request.num_sublayers, b, ENUMERATED) for b in request.block_counts)
    return choices * work <= ENUMERATED


def _all_choices(request: PlanRequest) -> Iterator[BlockLayouts]:
    for blocks in request.block_counts:
        for starts in all_blocks(request.num_sublayers, blocks):
            yield _layouts(request, starts)


def _layouts(request: PlanRequest, starts: tuple[int, ...]) -> BlockLayouts:
    (stream,) = request.costs.streams
    return {stream.name: request.layout(starts, stream.count)}


def _some_choices(request: PlanRequest) -> Iterator[_SearchResult]:
    """Even blocks, the latest, and those that begin where stages of either do."""
    for blocks in request.block_counts:
        count = request.num_sublayers
        yield _SearchResult(None, _bound(request, blocks), NEVER)
        layouts: list[tuple[int, ...] | None] = [even_starts(count, blocks), latest_blocks(count, blocks, {}, {})]
        tried: set[tuple[int, ...]] = set()
        for layout in layouts:
            starts = layout
            while starts is not None and starts not in tried:
                tried.add(starts)
                results = _both(request, _layouts(request, starts))
                yield from results
                best = next((r.best for r in results if r.best is not None), None)
                starts = at_stages(best.starts, count, blocks) if best is not None else None


def _bound(request: PlanRequest, blocks: int) -> int:
    """Picoseconds that the slowest stage takes at least, wherever so many blocks begin.

    With the latest blocks no read of `block` has more sources than with others and no cut is crossed by more, if cuts
    may be anywhere. In `local` no choice is the fastest everywhere, but none reads less in all than even blocks: a
    block's reads grow with the square of its size. There the slowest stage takes no less than the mean, and no less
    than if reads and hops took no time.
    """
    count = request.num_sublayers
    anywhere = replace(request, align="prefer", memory_limit=None)
    if request.variant != "local":
        latest = latest_blocks(count, blocks, {}, {})
        return _least(anywhere, _layouts(request, latest)) if latest is not None else NEVER
    even = _layouts(request, even_starts(count, blocks))
    units = units_of(request, even)
    work = sum(units.forward) + sum(units.backward) + units.before.work + units.after.work
    streams = tuple(replace(s, value_bytes=0) for s in request.costs.streams)
    unread = replace(anywhere, costs=replace(request.costs, streams=streams))
    return max(-(-work // request.num_virtual), _least(unread, even))


def _least(request: PlanRequest, block_layouts: BlockLayouts) -> int:
    if request.virtual_stages > 1:
        return InterleavedSearch(request, block_layouts).bound()
    return CutSearch(request, block_layouts).slowest(None)


def at_stages(stages: Sequence[int], count: int, blocks: int) -> tuple[int, ...] | None:
    """Allowed blocks that begin where stages do, as near to even as those are; None where there are none.

    Where blocks are fewer than stages all begin with one; else each stage begins with one.
    """
    low, high = block_sizes(count, blocks)
    even = even_starts(count, blocks)
    forced = set(stages) if blocks >= len(stages) else set()
    places = sorted({*stages} if not forced else range(count))

    def may_follow(last: int, place: int) -> bool:
        return low <= place - last <= high and not any(last < f < place for f in forced)

    choices: _BlockChoices = {0: (0, (0,))}
    for k in range(1, blocks):
        choices = _one_block_more(choices, places, even[k], may_follow)
    ends = [
        nearest for last, nearest in choices.items() if 1 <= count - last <= high and last >= max(forced, default=0)
    ]
    return min(ends)[1] if ends else None


def _one_block_more(
    choices: _BlockChoices, places: Iterable[int], even: int, may_follow: Callable[[int, int], bool]
) -> _BlockChoices:
    """Choices with one block more, which would begin at `even` if blocks were even; the nearest for each start."""
    longer: _BlockChoices = {}
    for last, (distance, starts) in choices.items():
        for place in places:
            if may_follow(last, place):
                candidate = (distance + abs(place - even), (*starts, place))
                longer[place] = min(candidate, longer.get(place, candidate))
    return longer


def _both(request: PlanRequest, block_layouts: BlockLayouts) -> list[_SearchResult]:
    """The best stages of all, and the best aligned ones."""
    free = _best_cuts(request, block_layouts, aligned=False)
    if request.align == "require":
        return [free]
    return [free, _best_cuts(request, block_layouts, aligned=True)]


def _best_cuts(request: PlanRequest, block_layouts: BlockLayouts, *, aligned: bool) -> _SearchResult:
    if request.virtual_stages > 1:
        interleaved = search_interleaved(request, block_layouts, aligned=aligned)
        return _SearchResult(interleaved.best, interleaved.bound, interleaved.least_memory)
    search = CutSearch(request, block_layouts, aligned=aligned)
    slowest = search.slowest(request.memory_limit)
    if slowest >= NEVER:
        return _SearchResult(None, NEVER, search.least_memory())
    _, starts = search.cuts(slowest, request.memory_limit)
    return _SearchResult(evaluate(request, starts, block_layouts, search.units), slowest, NEVER)


def _infeasible(request: PlanRequest, least_memory: int) -> PlanError:
    if request.memory_limit is not None and least_memory < NEVER:
        more = least_memory - request.memory_limit
        return PlanError(
            f"no stages fit memory_limit={request.memory_limit} ({size(request.memory_limit)}): a rank needs "
            f"{least_memory} ({size(least_memory)}), {size(more)} more. Raise memory_limit by that, or choose more "
            f"num_stages, recompute=True, or a smaller microbatch."
        )
    blocks = max(request.block_counts, default=0) if request.known_layouts is None else 0
    num_given = sum(s.num_blocks for s in (request.known_layouts or {}).values())
    return PlanError(
        f"no plan has all {request.num_virtual} stages begin with a block: there are {blocks or num_given} blocks"
        + (f", and stages begin at {request.starts}" if request.starts is not None else "")
        + f". Choose num_blocks of at least {request.num_virtual}, fewer stages, or align='prefer'."
    )
