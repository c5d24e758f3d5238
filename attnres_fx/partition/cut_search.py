"""The best cuts for given blocks where a hop depends on its own cut alone: exact, by dynamic programming.

With V = 1 that is every plan: what any later stage needs crosses each cut on its way there. A rank's stage is then known
by its two ends, and its time and memory are differences of sums.

Costs of stage c come as a matrix over pairs of places: row = where it begins, column = where the next one does.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from attnres_fx.partition.crossing import crossing_bytes, crossing_values
from attnres_fx.partition.objective import Numbers, hop_time, is_aligned, numbers_of, resident
from attnres_fx.partition.request import PlanRequest, Schedules

#: More than any time or number of bytes; twice that still fits.
NEVER = 2**61

#: Matrix of a stage by its index.
PerStage = Callable[[int], Tensor]


def least_maximum(cost: PerStage, count: int, places: int) -> int:
    """The smallest maximum of a plan's `count` costs; NEVER or more where there is no plan."""
    best = _at_the_end(places)
    for stage in reversed(range(count)):
        best = torch.maximum(cost(stage), best).amin(1)
    return int(best[0])


def least_sum(allowed: PerStage, weight: PerStage, count: int, places: int) -> tuple[int, list[int]]:
    """The smallest sum of `weight` over a plan's cuts, and the earliest such cuts, as places.

    weight: for each stage, of the cut at its end, per place.

    allowed: which stages may be. A plan there is must be: `least_maximum` has found one.
    """
    rest = [_at_the_end(places)]
    for stage in reversed(range(count)):
        rest.append(torch.where(allowed(stage), weight(stage) + rest[-1], NEVER).amin(1))
    rest.reverse()
    cuts = [0]
    for stage in range(count - 1):
        at = cuts[-1]
        through = torch.where(allowed(stage)[at], weight(stage) + rest[stage + 1], NEVER)
        cuts.append(int((through == rest[stage][at]).nonzero()[0, 0]))
    return int(rest[0][0]), cuts


def _at_the_end(places: int) -> Tensor:
    best = torch.full((places,), NEVER)
    best[-1] = 0
    return best


class CutSearch:
    """Stages of a request for given blocks, where each hop carries everything that crosses its cut.

    align="require" and given stage starts leave fewer places. Positions are those of the chain.
    """

    def __init__(self, request: PlanRequest, schedules: Schedules, numbers: Numbers | None = None) -> None:
        self.request, self.schedules = request, schedules
        self.numbers = numbers or numbers_of(request, schedules)
        self.count = request.num_virtual
        length = request.num_sublayers
        self.aligned = [is_aligned(request.costs, schedules, p) for p in range(length)]
        places = range(length) if request.starts is None else request.starts
        places = [p for p in places if p == 0 or request.align == "prefer" or self.aligned[p]]
        self.places = torch.tensor([*places, length])
        self.forward, self.backward = crossing_bytes(crossing_values(request.costs, schedules), length)

    @cached_property
    def inside(self) -> Tensor:
        """Pairs of places that hold at least one sublayer."""
        return self.places[None, :] > self.places[:, None]

    def between(self, per_sublayer: Sequence[int]) -> Tensor:
        """Sums over the sublayers from row to column."""
        sums = torch.tensor([0, *per_sublayer]).cumsum(0)[self.places]
        return sums[None, :] - sums[:, None]

    @cached_property
    def _time(self) -> Tensor:
        numbers = self.numbers
        hops = [hop_time(self.request, f, b) for f, b in zip(self.forward, self.backward, strict=True)]
        hops[-1] = 0  # nothing leaves the last stage
        times = self.between([f + b for f, b in zip(numbers.forward, numbers.backward, strict=True)])
        return torch.where(self.inside, times + torch.tensor(hops)[self.places], NEVER)

    def time(self, stage: int) -> Tensor:
        """Picoseconds of a stage and the hop that leaves it; NEVER where it would be empty."""
        return self._time + sum(self._ends(stage, [n[0] + n[1] for n in (self.numbers.before, self.numbers.after)]))

    def _ends(self, stage: int, values: Sequence[int]) -> list[int]:
        """What the embedding and the head add to this stage."""
        return [v for v, here in zip(values, (stage == 0, stage == self.count - 1), strict=True) if here]

    @cached_property
    def _parameters(self) -> Tensor:
        return self.between([s.parameter_bytes for s in self.request.costs.sublayers])

    @cached_property
    def _kept(self) -> Tensor:
        """Per microbatch: activations, the sources made here, and what was received."""
        kept = self.between([s + m for s, m in zip(self.numbers.saved, self.numbers.made, strict=True)])
        return kept + torch.tensor(self.forward)[self.places][:, None]

    @cached_property
    def _recomputed(self) -> Tensor | int:
        if not self.request.recompute:
            return 0
        sizes = torch.tensor([s.activation_bytes for s in self.request.costs.sublayers])
        largest = torch.where(torch.ones(len(sizes), len(sizes)).triu() > 0, sizes, 0).cummax(1).values
        found = torch.zeros(len(self.places), len(self.places), dtype=torch.long)
        found[:-1, 1:] = largest[self.places[:-1]][:, self.places[1:] - 1]
        return found

    def memory(self, stage: int) -> Tensor:
        """Bytes of the rank that runs this stage, at its fullest moment."""
        request, costs = self.request, self.request.costs
        ((in_flight,),) = request.moments[stage]
        parameters = self._parameters + sum(
            self._ends(stage, [costs.before.parameter_bytes, costs.after.parameter_bytes])
        )
        for size, places in costs.tied:
            first, *others = (self._holds(place, stage) for place in places)
            for i, other in enumerate(others):
                earlier = torch.stack([first, *others[:i]]).any(0)
                parameters = parameters + size * (other & ~earlier)
        kept = self._kept + sum(self._ends(stage, [self.numbers.before[2], self.numbers.after[2]]))
        return resident(request, parameters) + in_flight * kept + self._recomputed

    def _holds(self, place: str, stage: int) -> Tensor:
        if place in ("before", "after"):
            here = stage == (0 if place == "before" else self.count - 1)
            return torch.full_like(self.inside, here)
        sublayer = int(place)
        return (self.places[:, None] <= sublayer) & (self.places[None, :] > sublayer)

    def fitting(self, limit: int | None) -> PerStage:
        """`time` of the stages that fit the memory."""
        if limit is None:
            return self.time
        return lambda stage: torch.where(self.memory(stage) <= limit, self.time(stage), NEVER)

    def slowest(self, limit: int | None) -> int:
        """The shortest time of the slowest stage; NEVER or more where no plan fits."""
        return least_maximum(self.fitting(limit), self.count, len(self.places))

    def least_memory(self) -> int:
        """The smallest memory limit that some plan fits."""
        return least_maximum(
            lambda stage: torch.where(self.inside, self.memory(stage), NEVER), self.count, len(self.places)
        )

    def cuts(self, slowest: int, limit: int | None) -> tuple[tuple[int, int], tuple[int, ...]]:
        """Of the plans no slower than that: the fewest bytes, then cuts inside blocks, and the earliest such starts."""
        times = self.fitting(limit)
        weights = self.weights
        found, cuts = least_sum(
            lambda stage: times(stage) <= slowest, lambda stage: weights, self.count, len(self.places)
        )
        return divmod(found, self.count + 1), tuple(int(self.places[c]) for c in cuts)

    @cached_property
    def weights(self) -> Tensor:
        return self.weigh(self.forward, self.backward)

    def weigh(self, forward: Sequence[int], backward: Sequence[int]) -> Tensor:
        """Bytes first, then whether a block is cut, as one number per place."""
        pairs = zip(forward, backward, self.aligned, strict=False)
        weights = [(f + b) * (self.count + 1) + (not aligned) for f, b, aligned in pairs]
        return torch.tensor([0, *weights[1:], 0])[self.places]
