"""Stages for given blocks with several virtual stages a rank (V > 1): good ones, and how far from the best at most.

What a hop carries then depends on what its rank has seen P stages before, and a rank's memory on all its stages, so
a stage cannot be judged by itself. The search is (1) a fixed-point iteration: it plans with what each hop would
carry if the other stages stayed where they are, until nothing changes; (2) where ranks do not fit the memory limit, the
same with a limit on what one stage may take, lowered until they do, and at last with the least memory alone; (3) a
local search that moves single cuts while that helps.

The bound: every hop carries at least the sources its own stage makes, and memory is no limit.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnres_fx.partition.costs.cut_bytes import BlockLayouts, crossing_sources
from attnres_fx.partition.costs.unit_costs import UnitCosts
from attnres_fx.partition.planner.cut_search import NEVER, CutSearch, HopCosts, at_ends, least_maximum, least_sum
from attnres_fx.partition.planner.objective import Partition, are_aligned, evaluate
from attnres_fx.partition.planner.request import PlanRequest

#: Rounds of the fixed-point iteration.
ROUNDS = 6
#: How often the limits of stages are lowered.
LIMIT_ROUNDS = 16
#: Moves of single cuts tried, times what judging one takes (sublayers, and values that cross cuts).
MOVES = 200_000


class InterleavedSearch(CutSearch):
    """Costs of stages that know each other through the last plan alone (`set_neighbours`)."""

    def __init__(
        self,
        request: PlanRequest,
        block_layouts: BlockLayouts,
        units: UnitCosts | None = None,
        *,
        aligned: bool = False,
    ) -> None:
        super().__init__(request, block_layouts, units, aligned=aligned)
        self._known = {0: self.everything}
        self.set_neighbours(None)

    def set_neighbours(self, starts: tuple[int, ...] | None) -> None:
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

    def memory_share(self, stage: int) -> Tensor:
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
        for value in crossing_sources(self.request.costs.streams, self.block_layouts):
            for row, sign in ((0, 1), (value.maker + 1, -1)):
                corners[row, value.maker + 1] += sign * value.bytes
                corners[row, value.last + 1] -= sign * value.bytes
        rows, columns = self.places[:, None], at_ends(self.places, self.width)
        sizes, which = corners.cumsum(0).cumsum(1)[rows, columns].unique(return_inverse=True)
        hops = torch.tensor([self.hop_time(int(s), int(s)) for s in sizes])[which]
        least = self.work + torch.where(columns < self.length, hops, 0)
        ends = [end.work for end in (self.units.before, self.units.after)]
        return least_maximum(lambda stage: least + self.ends(stage, *ends), self.count, len(self.places))

    def plan(self, share_limits: Sequence[int]) -> tuple[int, ...] | None:
        """The best stages as far as this search sees, none taking more of its rank's memory than its limit."""

        def times(stage: int) -> Tensor:
            time = self.time(stage)
            return (
                time
                if share_limits[stage] >= NEVER
                else torch.where(self.memory_share(stage) <= share_limits[stage], time, NEVER)
            )

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

    def memory_shares(self, starts: Sequence[int]) -> list[int]:
        """`memory_share` of every stage of a plan."""
        at = torch.searchsorted(self.places, torch.tensor([*starts, self.length])).tolist()
        return [int(self.memory_share(c)[at[c], at[c + 1] - at[c] - 1]) for c in range(self.count)]

    def least_memory_share(self) -> int:
        """The smallest limit for all stages that leaves a plan."""
        self._build(len(self.places))
        return least_maximum(self.memory_share, self.count, len(self.places))


class InterleavedResult(NamedTuple):
    """best: of the plans that fit, None where none does. bound: picoseconds the slowest stage takes at least.
    least_memory: where none fits, a limit with which one is found."""

    best: Partition | None
    bound: int
    least_memory: int


def search_interleaved(
    request: PlanRequest, block_layouts: BlockLayouts, *, aligned: bool = False
) -> InterleavedResult:
    """Good stages for given blocks, with any number of virtual stages. aligned: as for `CutSearch`."""
    search = InterleavedSearch(request, block_layouts, aligned=aligned)
    plans = _PlanSearch(request, search)
    if not plans.iterate_to_fixed_point([NEVER] * search.count) and not plans.lower_share_limits():
        plans.iterate_to_fixed_point([search.least_memory_share()] * search.count)
    plans.search_locally()
    if plans.best() is None:  # a search that the limit does not lead, so that its least is found under that limit
        plans = _PlanSearch(request, search, least=True)
        plans.iterate_to_fixed_point([NEVER] * search.count)
        plans.iterate_to_fixed_point([search.least_memory_share()] * search.count)
        plans.search_locally()
    return InterleavedResult(plans.best(), search.bound(), plans.least_memory())


class _PlanSearch:
    """Plans found by fixed-point iteration, then by local search.

    least: whether they are compared by memory first, whatever the limit.
    """

    def __init__(self, request: PlanRequest, search: InterleavedSearch, *, least: bool = False) -> None:
        self.request, self.search, self.least = request, search, least
        self.plans: dict[tuple[int, ...], Partition] = {}

    def evaluated(self, starts: tuple[int, ...]) -> Partition:
        if starts not in self.plans:
            self.plans[starts] = evaluate(self.request, starts, self.search.block_layouts, self.search.units)
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

    def iterate_to_fixed_point(self, share_limits: Sequence[int]) -> bool:
        """Plan with the hops of the last plan until stages stay; whether one of the plans fits the memory."""
        self.search.set_neighbours(None)
        seen: list[tuple[int, ...]] = []
        while len(seen) < ROUNDS and (starts := self.search.plan(share_limits)) is not None and starts not in seen:
            seen.append(starts)
            self.evaluated(starts)
            self.search.set_neighbours(starts)
        return any(self.fits(self.evaluated(starts)) for starts in seen)

    def lower_share_limits(self) -> bool:
        """Limit the largest stages of ranks that do not fit to less than they take, until all fit or none is left."""
        limit, ranks = self.request.memory_limit or 0, self.request.num_stages
        share_limits = [NEVER] * self.search.count
        for _ in range(LIMIT_ROUNDS):
            if (starts := self.search.plan(share_limits)) is None:
                return False
            plan = self.evaluated(starts)
            if self.fits(plan):
                return True
            shares = self.search.memory_shares(starts)
            widths = [b - a for a, b in pairwise((*starts, self.search.length))]
            for rank, memory in enumerate(plan.memory_bytes):
                excess = float(memory - limit)
                for stage in sorted(range(rank, len(share_limits), ranks), key=lambda c: -shares[c]):
                    if excess > 0:
                        share_limits[stage] = min(share_limits[stage], shares[stage] - 1)
                        excess -= shares[stage] / widths[stage]  # about what one sublayer takes
            self.search.set_neighbours(starts)
        return False

    def search_locally(self) -> None:
        """Local search: move single cuts by one place while the plan gets better, or nearer to fitting."""
        values_per_cut = sum(v.last - v.maker for v in self.search.values) * self.search.count // self.search.length
        budget = MOVES // (self.search.length + values_per_cut)
        found = min(self.plans.values(), key=self._key, default=None)
        while found is not None:
            for candidate in self._neighbours(found):
                known = candidate in self.plans
                if not known and budget == 0:
                    return
                budget -= not known
                moved = self.evaluated(candidate)
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
        return are_aligned(self.request.costs, self.search.block_layouts, starts)
