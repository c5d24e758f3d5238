"""Where to cut: stages, and blocks where they are free.

With V = 1 and given blocks the plan is the best there is, by dynamic programming (`cut_search`). Free blocks: where there
are few choices each of them is tried. Where there are many:

- `block`: a read sees 1 + the blocks begun before it, whether the last of them is finished or not. So later boundaries
  make every read, cut and rank cheaper, and of the allowed ones the latest (`latest_blocks`) have the best time and
  bytes. From there boundaries go back to stage cuts and to even sizes as far as that costs neither.
- `local`: TODO
"""

from collections.abc import Iterator
from dataclasses import replace

from attnres_fx.errors import PlanError
from attnres_fx.partition.blocks import all_blocks
from attnres_fx.partition.cut_search import NEVER, CutSearch
from attnres_fx.partition.looped import find_looped
from attnres_fx.partition.objective import Partition, evaluate
from attnres_fx.partition.request import PlanRequest, Schedules, check_request
from attnres_fx.passes.schedule import DepthSchedule

#: Choices of blocks that are all tried, times sublayers times stages.
ENUMERATED = 200_000


def find_partition(request: PlanRequest) -> Partition:
    """The stages, and the blocks where they are free, with the smallest `Partition.objective`.

    Raises PlanError where nothing fits, saying what to change.
    """
    check_request(request)
    found = _find_looped(request) if request.virtual_stages > 1 else _find(request)
    if found is None:
        raise PlanError("nothing fits")
    return found


def _find(request: PlanRequest) -> Partition | None:
    best: Partition | None = None
    for schedules in _choices(request):
        found = best_cuts(request, schedules, best)
        if found is not None and (best is None or found.objective < best.objective):
            best = found
    return best


def _choices(request: PlanRequest) -> Iterator[Schedules]:
    if request.known_schedules is not None:
        yield request.known_schedules
        return
    (stream,) = request.costs.streams
    for blocks in request.block_counts:
        for starts in all_blocks(stream.count, blocks):
            yield {stream.name: DepthSchedule(request.variant, starts, stream.count)}


def best_cuts(request: PlanRequest, schedules: Schedules, known: Partition | None = None) -> Partition | None:
    """The best stages for given blocks, V = 1; None where nothing fits, or where it is slower than what is known."""
    search = CutSearch(request, schedules)
    slowest = search.slowest(request.memory_limit)
    if slowest >= NEVER or (known is not None and slowest > known.slowest):
        return None
    _, starts = search.cuts(slowest, request.memory_limit)
    return evaluate(request, starts, schedules, search.numbers)


def _find_looped(request: PlanRequest) -> Partition | None:
    for schedules in _choices(request):
        found = find_looped(request, schedules)
        if found.best is not None:
            return replace(found.best, gap=max(0.0, found.best.slowest / found.bound - 1))
    return None
