"""Stages for given blocks with several virtual stages a rank (V > 1): good ones, and how far from the best at most.

What a hop carries then depends on what its rank has seen P stages before, and a rank's memory on all its stages, so
stages no longer stand for themselves. The search (1) plans with what each hop would carry if the other stages stayed
where they are, until nothing changes; (2) moves single cuts while that helps; (3) where ranks do not fit the memory
limit, caps what one stage may take and lowers the cap until they do.

The bound: every hop carries at least the sources its own stage makes, and memory is no limit.
"""

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from attnres_fx.partition.crossing import crossing_bytes, crossing_values
from attnres_fx.partition.cut_search import NEVER, CutSearch, least_maximum, least_sum
from attnres_fx.partition.objective import Numbers, Partition, evaluate, hop_time, resident
from attnres_fx.partition.request import PlanRequest, Schedules

ROUNDS = 6
CAPS = 10
#: Single moves tried, times sublayers.
MOVES = 40_000


class LoopedSearch(CutSearch):
    """Costs of stages that know each other through the last plan alone (`follow`)."""

    def __init__(self, request: PlanRequest, schedules: Schedules, numbers: Numbers | None = None) -> None:
        super().__init__(request, schedules, numbers)
        self._length = request.num_sublayers
        self._values = crossing_values(request.costs, schedules)
        self._work = self.between([f + b for f, b in zip(self.numbers.forward, self.numbers.backward, strict=True)])
        self._hops: list[tuple[Tensor, Tensor]] = []
        self.follow(None)

    def follow(self, starts: tuple[int, ...] | None) -> None:
        """Let hops carry what they would beside these stages; None: all that crosses."""
        by_position: dict[int, tuple[Tensor, Tensor]] = {}
        self._hops = []
        for stage in range(self.count):
            # A value walks to the last rank that has not seen it, P - 1 hops.
            oldest = stage - self.request.num_stages + 2
            since = starts[oldest] if starts is not None and oldest > 0 and self.request.cache else 0
            if since not in by_position:
                forward, backward = crossing_bytes(self._values, self._length, since)
                times = [hop_time(self.request, f, b) for f, b in zip(forward, backward, strict=True)]
                by_position[since] = (torch.tensor([*times[:-1], 0])[self.places], self.weigh(forward, backward))
            self._hops.append(by_position[since])

    def time(self, stage: int) -> Tensor:
        ends = sum(self._ends(stage, [n[0] + n[1] for n in (self.numbers.before, self.numbers.after)]))
        return torch.where(self.inside, self._work + self._hops[stage][0] + ends, NEVER)

    def share(self, stage: int) -> Tensor:
        """About what a stage takes of its rank's memory."""
        rank, chunk = stage % self.request.num_stages, stage // self.request.num_stages
        most = max(counts[chunk] for counts in self.request.moments[rank])
        ends = sum(self._ends(stage, [n[2] for n in (self.numbers.before, self.numbers.after)]))
        parts = (self.request.costs.before.parameter_bytes, self.request.costs.after.parameter_bytes)
        parameters = resident(self.request, self._parameters + sum(self._ends(stage, parts)))
        return torch.where(self.inside, parameters + most * (self._kept + ends) + self._recomputed, NEVER)

    @cached_property
    def bound(self) -> int:
        """Picoseconds that the slowest stage of every plan takes at least."""
        size = self._length + 1
        corners = torch.zeros(size + 1, size + 1, dtype=torch.long)
        # A value that only some stages use need not take the next hop.
        sources = crossing_values(replace(self.request.costs, carried=()), self.schedules)
        for value in sources if self.request.num_stages > 1 else ():
            corners[0, value.made + 1] += value.bytes
            corners[value.made + 1, value.made + 1] -= value.bytes
            corners[0, value.last + 1] -= value.bytes
            corners[value.made + 1, value.last + 1] += value.bytes
        made_here = corners.cumsum(0).cumsum(1)[self.places][:, self.places]
        sizes, which = made_here.unique(return_inverse=True)
        times = torch.tensor([hop_time(self.request, int(s), int(s)) for s in sizes])[which]
        times[:, -1] = 0
        least = torch.where(self.inside, self._work + times, NEVER)
        ends = [n[0] + n[1] for n in (self.numbers.before, self.numbers.after)]
        return least_maximum(lambda stage: least + sum(self._ends(stage, ends)), self.count, len(self.places))

    def plan(self, cap: int | None) -> tuple[int, ...] | None:
        """The best stages as far as this search sees, none taking more than `cap` of a rank's memory."""

        def times(stage: int) -> Tensor:
            time = self.time(stage)
            return time if cap is None else torch.where(self.share(stage) <= cap, time, NEVER)

        slowest = least_maximum(times, self.count, len(self.places))
        if slowest >= NEVER:
            return None
        _, cuts = least_sum(
            lambda stage: times(stage) <= slowest, lambda stage: self._hops[stage][1], self.count, len(self.places)
        )
        return tuple(int(self.places[c]) for c in cuts)


class Found(NamedTuple):
    """best: of the plans that fit, None where none does. bound: picoseconds the slowest stage takes at least.
    least_memory: the smallest limit that a plan seen would fit."""

    best: Partition | None
    bound: int
    least_memory: int


def find_looped(request: PlanRequest, schedules: Schedules) -> Found:
    """Good stages for given blocks, with any number of virtual stages."""
    search = LoopedSearch(request, schedules)
    tried = _Tried(request, search)
    if not tried.settle(None):
        low = least_maximum(search.share, search.count, len(search.places))
        high = max(int(torch.where(search.inside, search.share(c), 0).max()) for c in range(search.count))
        tried.settle(low)
        for _ in range(CAPS):
            cap = (low + high) // 2
            low, high = (cap, high) if tried.settle(cap) else (low, cap)
    tried.move_cuts()
    return Found(tried.best(), search.bound, tried.least_memory())


class _Tried:
    """Plans that have been judged."""

    def __init__(self, request: PlanRequest, search: LoopedSearch) -> None:
        self.request, self.search = request, search
        self.plans: dict[tuple[int, ...], Partition] = {}

    def judge(self, starts: tuple[int, ...]) -> Partition:
        if starts not in self.plans:
            self.plans[starts] = evaluate(self.request, starts, self.search.schedules, self.search.numbers)
        return self.plans[starts]

    def fits(self, plan: Partition) -> bool:
        return self.request.memory_limit is None or max(plan.memory_bytes) <= self.request.memory_limit

    def best(self) -> Partition | None:
        return min(filter(self.fits, self.plans.values()), key=lambda p: p.objective, default=None)

    def least_memory(self) -> int:
        return min((max(p.memory_bytes) for p in self.plans.values()), default=NEVER)

    def settle(self, cap: int | None) -> bool:
        """Plan under a cap until stages stay; whether one of the plans fits the memory."""
        self.search.follow(None)
        seen: list[tuple[int, ...]] = []
        while len(seen) < ROUNDS and (starts := self.search.plan(cap)) is not None and starts not in seen:
            seen.append(starts)
            self.judge(starts)
            self.search.follow(starts)
        return any(self.fits(self.judge(starts)) for starts in seen)

    def move_cuts(self) -> None:
        """Move single cuts by one place while the plan gets better."""
        places = self.search.places.tolist()
        left = MOVES // self.request.num_sublayers
        found, before = self.best(), None
        while found is not None and found is not before and left > 0:
            before = found
            for cut in range(1, self.search.count):
                at = places.index(found.starts[cut])
                edges = (*found.starts, self.request.num_sublayers)
                for start in (places[at - 1], places[at + 1]):
                    if edges[cut - 1] < start < edges[cut + 1]:
                        left -= 1
                        moved = self.judge((*found.starts[:cut], start, *found.starts[cut + 1 :]))
                        if self.fits(moved) and moved.objective < found.objective:
                            found = moved
                            break
