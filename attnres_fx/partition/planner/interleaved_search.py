"""Stages for given blocks with several virtual stages a rank (V > 1): good ones, and how far from the best at most.

What a hop carries then depends on what its rank has seen P stages before, and a rank's memory on all its stages, so
stages no longer stand for themselves. The search (1) plans with what each hop would carry if the other stages stayed
where they are, until nothing changes; (2) moves single cuts while that helps; (3) where ranks do not fit the memory
limit, caps what one stage may take and lowers the cap until they do, and at last looks for the least memory alone.

The bound: every hop carries at least the sources its own stage makes, and memory is no limit.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnres_fx.partition.planner.cut_bytes import crossing_sources
from attnres_fx.partition.planner.cut_search import NEVER, CutSearch, HopCosts, at_ends, least_maximum, least_sum
from attnres_fx.partition.planner.objective import Numbers, Partition, are_aligned, evaluate, hop_time
from attnres_fx.partition.planner.request import PlanRequest, Schedules

ROUNDS = 6
CAPS = 16
#: Moves of single cuts tried, times what judging one takes (sublayers, and values that cross cuts).
MOVES = 200_000


class LoopedSearch(CutSearch):
    """Costs of stages that know each other through the last plan alone (`follow`)."""

    def __init__(
        self, request: PlanRequest, schedules: Schedules, numbers: Numbers | None = None, *, aligned: bool = False
    ) -> None:
        super().__init__(request, schedules, numbers, aligned=aligned)
        self._known = {0: self.everything}
        self.follow(None)

    def follow(self, starts: tuple[int, ...] | None) -> None:
        """Let hops carry what they would beside these stages; None: all that crosses."""
        self._since = []
        for stage in range(self.count):
            # A value walks to the last rank that has not seen it, P - 1 hops.
            oldest = stage - self.request.num_stages + 2
            since = starts[oldest] if starts is not None and 0 < oldest <= stage and self.request.cache else 0
            if since not in self._known:
                self._known[since] = self.hop_costs(since)
            self._since.append(since)

    def hop(self, stage: int) -> HopCosts:
        return self._known[self._since[max(stage, 0)]]

    def share(self, stage: int) -> Tensor:
        """About what a stage takes of its rank's memory."""
        rank, chunk = stage % self.request.num_stages, stage // self.request.num_stages
        most = max(counts[chunk] for counts in self.request.moments[rank])
        return torch.where(self.inside, self._memory(stage, most), NEVER)

    def bound(self) -> int:
        """Picoseconds that the slowest stage of every plan takes at least."""
        while True:
            found = self._bound()
            if self.holds(found, self.work):
                return found

    def _bound(self) -> int:
        # Every hop carries the sources its stage makes. (Values that only some stages use need not take it.)
        corners = torch.zeros(self.length + 2, self.length + 2, dtype=torch.long)
        for value in crossing_sources(self.request.costs.streams, self.schedules):
            for row, sign in ((0, 1), (value.made + 1, -1)):
                corners[row, value.made + 1] += sign * value.bytes
                corners[row, value.last + 1] -= sign * value.bytes
        rows, columns = self.places[:, None], at_ends(self.places, self.width)
        sizes, which = corners.cumsum(0).cumsum(1)[rows, columns].unique(return_inverse=True)
        hops = torch.tensor([hop_time(self.request, int(s), int(s)) for s in sizes])[which]
        least = self.work + torch.where(columns < self.length, hops, 0)
        ends = [n[0] + n[1] for n in (self.numbers.before, self.numbers.after)]
        return least_maximum(lambda stage: least + self.ends(stage, *ends), self.count, len(self.places))

    def plan(self, caps: Sequence[int]) -> tuple[int, ...] | None:
        """The best stages as far as this search sees, none taking more of its rank's memory than its cap."""

        def times(stage: int) -> Tensor:
            time = self.time(stage)
            return time if caps[stage] >= NEVER else torch.where(self.share(stage) <= caps[stage], time, NEVER)

        while True:
            slowest = least_maximum(times, self.count, len(self.places))
            if self.holds(slowest, self.work):
                break
        if slowest >= NEVER:
            return None
        _, cuts = least_sum(
            lambda stage: times(stage) <= slowest, lambda stage: self.hop(stage).weight, self.count, len(self.places)
        )
        return tuple(int(self.places[c]) for c in cuts)

    def shares(self, starts: Sequence[int]) -> list[int]:
        """`share` of every stage of a plan."""
        at = torch.searchsorted(self.places, torch.tensor([*starts, self.length])).tolist()
        return [int(self.share(c)[at[c], at[c + 1] - at[c] - 1]) for c in range(self.count)]

    def least_share(self) -> int:
        """The smallest cap for all stages that leaves a plan."""
        self._build(len(self.places))
        return least_maximum(self.share, self.count, len(self.places))


class Found(NamedTuple):
    """best: of the plans that fit, None where none does. bound: picoseconds the slowest stage takes at least.
    least_memory: where none fits, a limit with which one is found."""

    best: Partition | None
    bound: int
    least_memory: int


def find_looped(request: PlanRequest, schedules: Schedules, *, aligned: bool = False) -> Found:
    """Good stages for given blocks, with any number of virtual stages. aligned: as for `CutSearch`."""
    search = LoopedSearch(request, schedules, aligned=aligned)
    tried = _Tried(request, search)
    if not tried.settle([NEVER] * search.count) and not tried.tighten():
        tried.settle([search.least_share()] * search.count)
    tried.move_cuts()
    if tried.best() is None:  # a search that the limit does not lead, so that its least is found under that limit
        tried = _Tried(request, search, least=True)
        tried.settle([NEVER] * search.count)
        tried.settle([search.least_share()] * search.count)
        tried.move_cuts()
    return Found(tried.best(), search.bound(), tried.least_memory())


class _Tried:
    """Plans that have been judged. least: by their memory first, whatever the limit."""

    def __init__(self, request: PlanRequest, search: LoopedSearch, *, least: bool = False) -> None:
        self.request, self.search, self.least = request, search, least
        self.plans: dict[tuple[int, ...], Partition] = {}

    def judge(self, starts: tuple[int, ...]) -> Partition:
        if starts not in self.plans:
            self.plans[starts] = evaluate(self.request, starts, self.search.schedules, self.search.numbers)
        return self.plans[starts]

    def fits(self, plan: Partition) -> bool:
        return self._excess(plan) == 0

    def _excess(self, plan: Partition) -> int:
        limit = self.request.memory_limit
        return 0 if limit is None else sum(max(0, memory - limit) for memory in plan.memory_bytes)

    def _key(self, plan: Partition) -> tuple[object, ...]:
        return max(plan.memory_bytes) if self.least else self._excess(plan), plan.objective

    def best(self) -> Partition | None:
        return min(filter(self.fits, self.plans.values()), key=lambda plan: plan.objective, default=None)

    def least_memory(self) -> int:
        return min((max(p.memory_bytes) for p in self.plans.values()), default=NEVER)

    def settle(self, caps: Sequence[int]) -> bool:
        """Plan until stages stay; whether one of the plans fits the memory."""
        self.search.follow(None)
        seen: list[tuple[int, ...]] = []
        while len(seen) < ROUNDS and (starts := self.search.plan(caps)) is not None and starts not in seen:
            seen.append(starts)
            self.judge(starts)
            self.search.follow(starts)
        return any(self.fits(self.judge(starts)) for starts in seen)

    def tighten(self) -> bool:
        """Cap the largest stages of ranks that do not fit below what they take, until all fit or no plan is left."""
        limit, ranks = self.request.memory_limit or 0, self.request.num_stages
        caps = [NEVER] * self.search.count
        for _ in range(CAPS):
            if (starts := self.search.plan(caps)) is None:
                return False
            plan = self.judge(starts)
            if self.fits(plan):
                return True
            shares = self.search.shares(starts)
            widths = [b - a for a, b in pairwise((*starts, self.search.length))]
            for rank, memory in enumerate(plan.memory_bytes):
                excess = float(memory - limit)
                for stage in sorted(range(rank, len(caps), ranks), key=lambda c: -shares[c]):
                    if excess > 0:
                        caps[stage] = min(caps[stage], shares[stage] - 1)
                        excess -= shares[stage] / widths[stage]  # about what one sublayer takes
            self.search.follow(starts)
        return False

    def move_cuts(self) -> None:
        """Move single cuts by one place while the plan gets better, or nearer to fitting."""
        crossing = sum(v.last - v.made for v in self.search.values) * self.search.count // self.search.length
        left = MOVES // (self.search.length + crossing)
        found = min(self.plans.values(), key=self._key, default=None)
        while found is not None:
            for candidate in self._neighbours(found):
                known = candidate in self.plans
                if not known and left == 0:
                    return
                left -= not known
                moved = self.judge(candidate)
                if self._key(moved) < self._key(found):
                    found = moved
                    break
            else:
                return

    def _neighbours(self, plan: Partition) -> Iterator[tuple[int, ...]]:
        """Plans with one cut moved, those beside the stages that are worst first."""
        places, starts = self.search.places.tolist(), plan.starts
        limit = max(plan.memory_bytes) - 1 if self.least else self.request.memory_limit or NEVER
        full = [plan.memory_bytes[c % self.request.num_stages] > limit for c in range(len(starts))]
        slow = plan.stage_seconds
        order = sorted(range(1, len(starts)), key=lambda c: (-(full[c] + full[c - 1]), -max(slow[c], slow[c - 1]), c))
        edges = (*starts, self.search.length)
        for cut in order:
            at = places.index(starts[cut])
            for start in (places[at - 1], places[at + 1]):
                moved = (*starts[:cut], start, *starts[cut + 1 :])
                if edges[cut - 1] < start < edges[cut + 1] and (not self.search.whole or self._whole(moved)):
                    yield moved

    def _whole(self, starts: Sequence[int]) -> bool:
        return are_aligned(self.request.costs, self.search.schedules, starts)
