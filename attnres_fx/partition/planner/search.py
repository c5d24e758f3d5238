"""Where to cut: stages, and blocks where they are free.

For given blocks and V = 1 the stages are the best there are, by dynamic programming (`cut_search`); for V > 1 they are
good ones, with a bound (`looped`). Free blocks are all tried where they are few. Where they are many, even blocks are,
the latest that are allowed (in `block` a read sees one source more for each block begun before it, so nothing is faster
than those), and blocks moved to where the stages of either begin.

Blocks that end where stages do keep a stage's work whole and its checkpoints readable, and even blocks are what the
model was designed with; neither shows in seconds. So among plans whose slowest stage is within `TOLERANCE` of the
fastest, aligned ones win, then those with the most even blocks, then `Partition.objective` decides.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.traffic import size
from attnres_fx.partition.planner.block_choices import all_blocks, block_sizes, count_blocks, even_blocks, latest_blocks
from attnres_fx.partition.planner.cut_search import NEVER, CutSearch
from attnres_fx.partition.planner.interleaved_search import LoopedSearch, find_looped
from attnres_fx.partition.planner.objective import Partition, evaluate, numbers_of
from attnres_fx.partition.planner.request import PlanRequest, Schedules, check_request
from attnres_fx.passes.schedule import DepthSchedule

#: How much slower than the fastest plan one may be that is aligned, or has more even blocks: a share.
TOLERANCE = 0.02
#: Choices of blocks that are all tried, times sublayers times stages.
ENUMERATED = 60_000


@dataclass(frozen=True)
class _Found:
    """best: of what fits, or None. bound: picoseconds the slowest stage takes at least. least_memory: a limit that is
    met by some plan; the smallest such for V = 1."""

    best: Partition | None
    bound: int
    least_memory: int


def find_partition(request: PlanRequest) -> Partition:
    """The stages, and the blocks where they are free, that are best under the rule at the head of this file.

    Raises PlanError where nothing fits, saying what to change.
    """
    check_request(request)
    found, exact = _search(request)
    plans = [f.best for f in found if f.best is not None]
    if not plans:
        raise _infeasible(request, _enough_memory(request, _least_memory(found)))
    bound = min(f.bound for f in found)
    best = preferred(plans)
    fastest = min(p.slowest for p in plans)
    return replace(best, gap=max(0.0, best.slowest / max(fastest if exact else bound, 1) - 1))


def _search(request: PlanRequest) -> tuple[list[_Found], bool]:
    """What was found for each choice of blocks, and whether the best of it is the best there is."""
    exact = request.virtual_stages == 1
    if request.known_schedules is not None:
        return _both(request, request.known_schedules), exact
    if _is_small(request):
        return [f for s in _all_choices(request) for f in _both(request, s)], exact
    return list(_some_choices(request)), False


def _least_memory(found: Iterable[_Found]) -> int:
    return min((f.least_memory for f in found), default=NEVER)


def _enough_memory(request: PlanRequest, least: int) -> int:
    """A limit under which a plan is found: for V > 1 the search goes other ways under other limits."""
    while request.memory_limit is not None and request.virtual_stages > 1 and least < NEVER:
        found, _ = _search(replace(request, memory_limit=least))
        if any(f.best is not None for f in found):
            break
        least = max(_least_memory(found), least + least // 50 + 1)
    return least


def preferred(plans: Iterable[Partition]) -> Partition:
    """The plan that the rule chooses: of those about as fast as the fastest, aligned, with even blocks, the best."""
    known = list(plans)
    limit = min(p.slowest for p in known) * (1 + TOLERANCE)
    return min((p for p in known if p.slowest <= limit), key=lambda p: (not p.aligned, unevenness(p), p.objective))


def unevenness(plan: Partition) -> int:
    """How much the longest block of a stream is longer than its shortest, where sizes differ by more than one."""
    sizes = [[len(b) for b in s.blocks] for _, s in plan.schedules if s.variant != "full"]
    return max((max(max(each) - min(each) - 1, 0) for each in sizes), default=0)


def _is_small(request: PlanRequest) -> bool:
    work = request.num_sublayers * request.num_virtual
    choices = sum(count_blocks(request.num_sublayers, b, ENUMERATED) for b in request.block_counts)
    return choices * work <= ENUMERATED


def _all_choices(request: PlanRequest) -> Iterator[Schedules]:
    for blocks in request.block_counts:
        for starts in all_blocks(request.num_sublayers, blocks):
            yield _schedules(request, starts)


def _schedules(request: PlanRequest, starts: tuple[int, ...]) -> Schedules:
    (stream,) = request.costs.streams
    return {stream.name: DepthSchedule(request.variant, starts, stream.count)}


def _some_choices(request: PlanRequest) -> Iterator[_Found]:
    """Even blocks, the latest, and those that begin where stages of either do."""
    for blocks in request.block_counts:
        count = request.num_sublayers
        yield _Found(None, _bound(request, blocks), NEVER)
        layouts: list[tuple[int, ...] | None] = [even_blocks(count, blocks), latest_blocks(count, blocks, {}, {})]
        tried: set[tuple[int, ...]] = set()
        for layout in layouts:
            starts = layout
            while starts is not None and starts not in tried:
                tried.add(starts)
                found = _both(request, _schedules(request, starts))
                yield from found
                best = next((f.best for f in found if f.best is not None), None)
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
        return _least(anywhere, _schedules(request, latest)) if latest is not None else NEVER
    even = _schedules(request, even_blocks(count, blocks))
    numbers = numbers_of(request, even)
    work = sum(map(sum, (numbers.forward, numbers.backward, numbers.before[:2], numbers.after[:2])))
    streams = tuple(replace(s, value_bytes=0) for s in request.costs.streams)
    unread = replace(anywhere, costs=replace(request.costs, streams=streams))
    return max(-(-work // request.num_virtual), _least(unread, even))


def _least(request: PlanRequest, schedules: Schedules) -> int:
    if request.virtual_stages > 1:
        return LoopedSearch(request, schedules).bound()
    return CutSearch(request, schedules).slowest(None)


def at_stages(stages: Sequence[int], count: int, blocks: int) -> tuple[int, ...] | None:
    """Allowed blocks that begin where stages do, as near to even as those are; None where there are none.

    Where blocks are fewer than stages all begin with one; else each stage begins with one.
    """
    low, high = block_sizes(count, blocks)
    even = even_blocks(count, blocks)
    forced = set(stages) if blocks >= len(stages) else set()
    places = sorted({*stages} if not forced else range(count))
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for k in range(1, blocks):
        step: dict[int, tuple[int, tuple[int, ...]]] = {}
        for last, (cost, starts) in best.items():
            for place in places:
                if low <= place - last <= high and not any(last < f < place for f in forced):
                    candidate = (cost + abs(place - even[k]), (*starts, place))
                    if place not in step or candidate < step[place]:
                        step[place] = candidate
        best = step
    ends = [found for last, found in best.items() if 1 <= count - last <= high and not any(last < f for f in forced)]
    return min(ends)[1] if ends else None


def _both(request: PlanRequest, schedules: Schedules) -> list[_Found]:
    """The best stages of all, and the best aligned ones."""
    free = _best_cuts(request, schedules, aligned=False)
    if request.align == "require":
        return [free]
    return [free, _best_cuts(request, schedules, aligned=True)]


def _best_cuts(request: PlanRequest, schedules: Schedules, *, aligned: bool) -> _Found:
    if request.virtual_stages > 1:
        looped = find_looped(request, schedules, aligned=aligned)
        return _Found(looped.best, looped.bound, looped.least_memory)
    search = CutSearch(request, schedules, aligned=aligned)
    slowest = search.slowest(request.memory_limit)
    if slowest >= NEVER:
        return _Found(None, NEVER, search.least_memory())
    _, starts = search.cuts(slowest, request.memory_limit)
    return _Found(evaluate(request, starts, schedules, search.numbers), slowest, NEVER)


def _infeasible(request: PlanRequest, least_memory: int) -> PlanError:
    if request.memory_limit is not None and least_memory < NEVER:
        more = least_memory - request.memory_limit
        return PlanError(
            f"no stages fit memory_limit={request.memory_limit} ({size(request.memory_limit)}): a rank needs "
            f"{least_memory} ({size(least_memory)}), {size(more)} more. Raise memory_limit by that, or choose more "
            f"num_stages, recompute=True, or a smaller microbatch."
        )
    blocks = max(request.block_counts, default=0) if request.known_schedules is None else 0
    given = sum(s.num_blocks for s in (request.known_schedules or {}).values())
    return PlanError(
        f"no plan has all {request.num_virtual} stages begin with a block: there are {blocks or given} blocks"
        + (f", and stages begin at {request.starts}" if request.starts is not None else "")
        + f". Choose num_blocks of at least {request.num_virtual}, fewer stages, or align='prefer'."
    )
