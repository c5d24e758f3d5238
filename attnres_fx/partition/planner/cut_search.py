"""The best cuts for given blocks where a hop depends on its own cut alone: exact, by dynamic programming.

With V = 1 that is every plan: what any later stage needs crosses each cut on its way there. A rank's stage is then
known by its two ends, and its time and memory are differences of sums.

Costs of a stage come as a band: a row for each place where it may begin, column d for the end d + 1 places further on.
A stage wider than the band must take longer than the plan found; where one does not, the band is widened.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnres_fx.partition.costs.cut_bytes import BlockLayouts, crossing_values, cut_bytes
from attnres_fx.partition.costs.stage_costs import hop_picoseconds, resident_bytes
from attnres_fx.partition.costs.unit_costs import UnitCosts
from attnres_fx.partition.planner.objective import is_aligned, units_of
from attnres_fx.partition.planner.request import PlanRequest

#: More than any time or number of bytes; twice that still fits.
NEVER = 2**61

#: Band of a stage by its index.
PerStage = Callable[[int], Tensor]


def at_ends(per_place: Tensor, width: int, outside: int = 0) -> Tensor:
    """A number per place as a band: that of the place where a stage ends."""
    padding = torch.full((width,), outside, dtype=per_place.dtype)
    return torch.cat([per_place[1:], padding]).unfold(0, width, 1)


def least_maximum(cost: PerStage, count: int, places: int) -> int:
    """The smallest maximum of a plan's `count` costs; NEVER or more where there is no plan."""
    best = _at_last_place(places)
    for stage in reversed(range(count)):
        costs = cost(stage)
        best = torch.maximum(costs, at_ends(best, costs.shape[1], NEVER)).amin(1)
    return int(best[0])


def least_sum(allowed: PerStage, weight: PerStage, count: int, places: int) -> tuple[int, list[int]]:
    """The smallest sum of `weight` over a plan's cuts, and the earliest such cuts, as places.

    Args:
        allowed: Which stages may be.
        weight: For each stage, of the cut at its end, per place.
        count: Stages of the plan.
        places: Where stages may begin or end.
    """
    rest, paths = _at_last_place(places), []
    for stage in reversed(range(count)):
        may = allowed(stage)
        through = torch.where(may, at_ends(weight(stage) + rest, may.shape[1], NEVER), NEVER)
        rest = through.amin(1)
        # The first of equals: booleans as bytes, whose argmax is the first.
        paths.append((through == rest[:, None]).byte().argmax(1) + 1)
    paths.reverse()
    cuts = [0]
    for stage in range(count - 1):
        cuts.append(cuts[-1] + int(paths[stage][cuts[-1]]))
    return int(rest[0]), cuts


def _at_last_place(places: int) -> Tensor:
    best = torch.full((places,), NEVER)
    best[-1] = 0
    return best


class HopCosts(NamedTuple):
    """Per place, of a hop at a cut there.

    Args:
        time: Picoseconds, both ways.
        weight: Bytes first, then whether a block is cut, as one number.
        forward: Bytes.
        backward: Bytes.
    """

    time: Tensor
    weight: Tensor
    forward: Tensor
    backward: Tensor


class CutSearch:
    """Stages of a request for given blocks, where each hop carries everything that crosses its cut.

    align="require" and given stage starts leave fewer places.
    """

    def __init__(
        self,
        request: PlanRequest,
        block_layouts: BlockLayouts,
        units: UnitCosts | None = None,
        *,
        aligned: bool = False,
    ) -> None:
        """A search for given blocks.

        Args:
            request: What is to be planned.
            block_layouts: By stream name.
            units: Times and bytes of every sublayer, where the caller has them.
            aligned: Whether to look only at stages that begin with blocks, or, where blocks are fewer, that end where
                the next begins.
        """
        self.request, self.block_layouts = request, block_layouts
        self.units = units or units_of(request, block_layouts)
        self.count = request.num_virtual
        self.length = request.num_sublayers
        self.aligned = [is_aligned(request.costs, block_layouts, p) for p in range(self.length)]
        at_blocks = request.align == "require" or (aligned and sum(self.aligned) >= self.count)
        self.whole = aligned and not at_blocks
        places: Sequence[int] = range(self.length) if request.starts is None else request.starts
        places = [p for p in places if p == 0 or not at_blocks or self.aligned[p]]
        self.places = torch.tensor([*places, self.length])
        self.values = crossing_values(request.costs, block_layouts)
        self.everything = self.hop_costs(0)
        self._build(4 * len(places) // self.count + 1)

    def _build(self, width: int) -> None:
        """The bands, up to so many places wide."""
        costs, units, count = self.request.costs, self.units, len(self.places)
        self.width = min(width, count - 1)
        self.inside = torch.arange(count)[:, None] + torch.arange(self.width)[None, :] + 1 < count
        self.work = self.between([f + b for f, b in zip(units.forward, units.backward, strict=True)])
        allowed = self.inside & ~self._holds_begin() if self.whole else self.inside
        self.work = torch.where(allowed, self.work, NEVER)
        self.parameters = self.between([s.parameter_bytes for s in costs.sublayers])
        # Per microbatch: activations and the sources made here.
        self.per_microbatch = self.between([s + m for s, m in zip(units.saved, units.produced, strict=True)])
        self.recomputed = self._recomputed() if self.request.recompute else torch.zeros_like(self.per_microbatch)
        self._fixed: dict[tuple[bool, bool], Tensor] = {}

    def _holds_begin(self) -> Tensor:
        """Whether a block begins inside each stage, after its start."""
        begun = torch.tensor([0, *self.aligned]).cumsum(0)  # blocks that begin before each place
        first = begun[(self.places + 1).clamp(max=self.length)]
        return at_ends(begun[self.places], self.width) > first[:, None]

    def holds(self, found: int, band: Tensor) -> bool:
        """Whether every stage wider than the bands costs more than what was found; widens them where not."""
        widest = band[:, -1][self.inside[:, -1]]
        if self.width == len(self.places) - 1 or int(widest.min()) > found:
            return True
        self._build(2 * self.width)
        return False

    def between(self, per_sublayer: Sequence[int]) -> Tensor:
        """Sums over the sublayers of each stage."""
        sums = torch.tensor([0, *per_sublayer]).cumsum(0)[self.places]
        return at_ends(sums, self.width) - sums[:, None]

    def hop_costs(self, since: int) -> "HopCosts":
        """Hops that carry all that crosses their cut and was made by the sublayer `since` or later ones."""
        travels = self.request.num_stages > 1
        forward, backward = cut_bytes(self.values if travels else [], self.length, since)
        pairs = list(zip(forward, backward, strict=True))[1 : self.length]
        known = {pair: self.hop_time(*pair) for pair in set(pairs)}
        times = [0, *(known[pair] for pair in pairs)]
        weights = [0]
        for (f, b), aligned in zip(pairs, self.aligned[1:], strict=True):
            weights.append((f + b) * (self.count + 1) + (not aligned))
        columns = ([*times, 0], [*weights, 0], forward, backward)
        return HopCosts(*(torch.tensor(column)[self.places] for column in columns))

    def hop_time(self, forward: int, backward: int) -> int:
        """Picoseconds of a hop of so many bytes, there and back."""
        ranks, device = self.request.num_stages, self.request.device
        return hop_picoseconds(forward, ranks, device) + hop_picoseconds(backward, ranks, device)

    def resident(self, parameter_bytes: Tensor) -> Tensor:
        """Bytes of parameters with their gradients and optimizer state."""
        return resident_bytes(parameter_bytes, self.request.optimizer_factor)

    def hop(self, stage: int) -> "HopCosts":
        """The hop that leaves a stage."""
        return self.everything

    def _recomputed(self) -> Tensor:
        """The largest activations of a stage's sublayers."""
        sizes = torch.tensor([s.activation_bytes for s in self.request.costs.sublayers])
        found, largest = torch.zeros_like(self.per_microbatch), sizes
        span = torch.where(self.inside, at_ends(self.places, self.width) - self.places[:, None], 0)
        for length in range(1, int(span.max()) + 1):
            here = span == length
            found[here] = largest[self.places[:, None].expand_as(span)[here]]
            if length < len(sizes):
                largest = torch.maximum(largest[:-1], sizes[length:])
        return found

    def ends(self, stage: int, before: int, after: int) -> int:
        """What the embedding and the head add to this stage."""
        return before * (stage == 0) + after * (stage == self.count - 1)

    def time(self, stage: int) -> Tensor:
        """Picoseconds of a stage and the hop that leaves it; NEVER or more where it would be empty."""
        ends = self.ends(stage, *(end.work for end in (self.units.before, self.units.after)))
        return self.work + at_ends(self.hop(stage).time + ends, self.width)

    def memory(self, stage: int) -> Tensor:
        """Bytes of the rank that runs this stage, at its fullest moment."""
        ((in_flight,),) = self.request.moments[stage]
        return self._memory(stage, in_flight)

    def _memory(self, stage: int, in_flight: int) -> Tensor:
        which = stage == 0, stage == self.count - 1
        if which not in self._fixed:
            self._fixed[which] = self.resident(self._parameters(stage)) + self.recomputed
        activations = self.per_microbatch + self.ends(stage, self.units.before.saved, self.units.after.saved)
        return self._fixed[which] + in_flight * (activations + self._arriving(stage))

    def _arriving(self, stage: int) -> Tensor:
        """What a stage receives of one microbatch, by where it begins."""
        if self.request.num_stages == 1 or stage == 0:
            return torch.zeros_like(self.per_microbatch)
        return self.hop(stage - 1).forward[:, None].expand_as(self.per_microbatch)

    def _parameters(self, stage: int) -> Tensor:
        costs = self.request.costs
        found = self.parameters + self.ends(stage, costs.before.parameter_bytes, costs.after.parameter_bytes)
        for size, places in costs.tied:
            seen, *others = (self._holds_place(place, stage) for place in places)
            for other in others:  # the first place has counted it
                found = found + size * (other & ~seen)
                seen = seen | other
        return found

    def _holds_place(self, place: str, stage: int) -> Tensor:
        if place in ("before", "after"):
            return torch.full_like(self.inside, stage == (0 if place == "before" else self.count - 1))
        sublayer = int(place)
        return (self.places[:, None] <= sublayer) & (at_ends(self.places, self.width) > sublayer)

    def fitting(self, limit: int | None) -> PerStage:
        """`time` of the stages that fit the memory."""
        if limit is None:
            return self.time
        return lambda stage: torch.where(self.memory(stage) <= limit, self.time(stage), NEVER)

    def slowest(self, limit: int | None) -> int:
        """The shortest time of the slowest stage; NEVER or more where no plan fits."""
        while True:
            found = least_maximum(self.fitting(limit), self.count, len(self.places))
            if self.holds(found, self.work):
                return found

    def least_memory(self) -> int:
        """The smallest memory limit that some plan fits."""

        def memory(stage: int) -> Tensor:
            return torch.where(self.inside, self.memory(stage), NEVER)

        while True:
            found = least_maximum(memory, self.count, len(self.places))
            if self.holds(found, torch.where(self.inside, self.resident(self.parameters) + self.per_microbatch, NEVER)):
                return found

    def cuts(self, slowest: int, limit: int | None) -> tuple[tuple[int, int], tuple[int, ...]]:
        """Of the plans no slower than that, which is no less than `slowest` has found: the fewest bytes, then cuts
        inside blocks, and the earliest such starts."""
        times = self.fitting(limit)
        found, cuts = least_sum(
            lambda stage: times(stage) <= slowest, lambda stage: self.hop(stage).weight, self.count, len(self.places)
        )
        return divmod(found, self.count + 1), tuple(int(self.places[c]) for c in cuts)
