"""What a plan is judged by, written once and slowly: the planner and its tests both ask here.

Times are whole picoseconds, so that sums do not depend on their order and equal plans compare equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from attnres_fx.partition.costs.model_costs import DeviceSpeed, ModelCosts, SublayerCost
from attnres_fx.partition.costs.stage_loads import reading_sublayer
from attnres_fx.partition.costs.traffic import carried_values, check_starts, stage_of
from attnres_fx.partition.planner.cut_bytes import crossing_sources
from attnres_fx.partition.planner.request import PlanRequest, Schedules
from attnres_fx.partition.split.routes import hops_of
from attnres_fx.passes.schedule import DepthSchedule

PICOSECONDS = 10**12

Number = TypeVar("Number", int, Tensor)


@dataclass(frozen=True)
class Numbers:
    """Per sublayer, with its depth reads: picoseconds forward and backward, bytes saved, and bytes of the sources it
    makes. before, after: the same but for those bytes, of what precedes and follows the chain.
    crossing: of every source that crosses a cut, the sublayer that makes it, the last cut and the bytes: [3, N]."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    saved: tuple[int, ...]
    made: tuple[int, ...]
    before: tuple[int, int, int]
    after: tuple[int, int, int]
    crossing: Tensor


@dataclass(frozen=True)
class Partition:
    """Stages and blocks, and what they cost; lists are per virtual stage unless they say "rank".

    starts: first sublayer of each. schedules: per stream its name and its blocks.
    forward_seconds, backward_seconds: of sublayers and depth reads. hop_seconds: of the hop that leaves it, there and
    back. hop_forward_bytes, hop_backward_bytes: on that hop. parameter_bytes. activation_bytes: of one microbatch, with
    the sources that no other stage takes. sent_bytes: of one microbatch, values made here that other stages take.
    received_bytes: of one microbatch, what arrives over the hop to it. memory_bytes: per rank, of parameters, their
    gradients and optimizer state, and of all that the microbatches in flight keep at the fullest moment.
    slowest_seconds: the largest of forward + backward + hop, which is what is made small first; traffic_bytes: over
    all hops, both ways, next; unaligned_cuts: stages that begin inside a block, then. aligned: whether every stage
    begins with a block, or, where blocks are fewer, every block with a stage.
    gap: how far slowest_seconds may be above the best there is, as a share of it; 0 where it is the best.
    """

    starts: tuple[int, ...]
    schedules: tuple[tuple[str, DepthSchedule], ...]
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    hop_seconds: tuple[float, ...]
    hop_forward_bytes: tuple[int, ...]
    hop_backward_bytes: tuple[int, ...]
    parameter_bytes: tuple[int, ...]
    activation_bytes: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    received_bytes: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    slowest: int
    traffic_bytes: int
    unaligned_cuts: int
    aligned: bool
    gap: float = 0.0

    @property
    def slowest_seconds(self) -> float:
        return self.slowest / PICOSECONDS

    @property
    def stage_seconds(self) -> tuple[float, ...]:
        """Of each virtual stage, with the hop that leaves it."""
        parts = zip(self.forward_seconds, self.backward_seconds, self.hop_seconds, strict=True)
        return tuple(sum(part) for part in parts)

    @property
    def block_starts(self) -> dict[str, tuple[int, ...]]:
        """First sublayer of each block, counted in its stream."""
        return {name: schedule.starts for name, schedule in self.schedules}

    @property
    def objective(self) -> tuple[object, ...]:
        """What is compared, first entries first: slowest stage, bytes, cuts inside blocks, then, so that one plan is
        the best: the earlier stages, the more blocks, the more even blocks."""
        return (
            self.slowest,
            self.traffic_bytes,
            self.unaligned_cuts,
            self.starts,
            tuple(block_order(schedule.starts, schedule.num_sublayers) for _, schedule in self.schedules),
        )


def block_order(starts: Sequence[int], count: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """More blocks first; then, block by block, the start nearest to where blocks of even size would begin."""
    size, longer = divmod(count, len(starts))
    even = (k * size + min(k, longer) for k in range(len(starts)))
    return -len(starts), tuple((abs(s - e), s) for s, e in zip(starts, even, strict=True))


@lru_cache(maxsize=1 << 16)
def picoseconds(count: float, per_second: float) -> int:
    """Time of so many operations or bytes at a speed."""
    return round(Fraction(count) / Fraction(per_second) * PICOSECONDS)


def count_sources(schedule: DepthSchedule, position: int) -> int:
    return position + 1 if schedule.variant == "full" else len(schedule.sources(position))


def numbers_of(request: PlanRequest, schedules: Schedules) -> Numbers:
    """Times and bytes of every sublayer with the reads it runs."""
    costs, device = request.costs, request.device
    timed = [_times(s, device, request.recompute) for s in costs.sublayers]
    forward, backward = [f for f, _ in timed], [b for _, b in timed]
    saved = [s.activation_bytes for s in costs.sublayers]
    made = [0] * len(saved)
    for stream in costs.streams:
        schedule = schedules[stream.name]
        # One number a value, so that times are linear in the number of sources.
        value = picoseconds(stream.value_bytes, device.memory_bandwidth)
        made[stream.first] += stream.value_bytes  # the root
        for position in range(1, stream.count + 1):
            sources = count_sources(schedule, position)
            reader = reading_sublayer(stream, schedule, position)
            forward[reader] += (sources + 1) * value
            backward[reader] += (3 * sources + 1) * value
            # Every sublayer makes one source: its output, or the sum of its block so far.
            made[stream.first + position - 1] += stream.value_bytes
        if schedule.variant == "local":
            for start in schedule.starts[1:]:  # the summary
                made[stream.first + start - 1] += stream.value_bytes
        if request.recompute:
            for i in range(stream.first, stream.first + stream.count):
                saved[i] = stream.value_bytes
    for crossing in costs.carried:
        made[max(crossing.produced, 0)] += crossing.bytes
    ends = [(*_times(s, device, False), s.activation_bytes) for s in (costs.before, costs.after)]
    spans = [(v.made, v.last, v.bytes) for v in crossing_sources(costs.streams, schedules)]
    return Numbers(
        tuple(forward),
        tuple(backward),
        tuple(saved),
        tuple(made),
        ends[0],
        ends[1],
        torch.tensor(spans, dtype=torch.long).reshape(-1, 3).T,
    )


def _times(part: SublayerCost, device: DeviceSpeed, recompute: bool) -> tuple[int, int]:
    again = part.forward_flops if recompute else 0.0
    return picoseconds(part.forward_flops, device.flops), picoseconds(part.backward_flops + again, device.flops)


def evaluate(
    request: PlanRequest, starts: Sequence[int], schedules: Schedules, numbers: Numbers | None = None
) -> Partition:
    """Everything about one choice of stages and blocks, whether it fits the memory limit or not.

    numbers: of the same request and schedules, where they are known. Raises PlanError where a stage would be empty.
    """
    costs, count = request.costs, len(starts)
    check_starts(starts, request.num_sublayers)
    numbers = numbers or numbers_of(request, schedules)
    leaving, there, back = _moved_bytes(request, starts, numbers.crossing)
    stages = [range(a, b) for a, b in zip(starts, (*starts[1:], request.num_sublayers), strict=True)]
    forward, backward, saved = (
        [sum(per[stage.start : stage.stop]) for stage in stages]
        for per in (numbers.forward, numbers.backward, numbers.saved)
    )
    for at, end in ((0, numbers.before), (-1, numbers.after)):
        forward[at] += end[0]
        backward[at] += end[1]
        saved[at] += end[2]
    hop_times = [hop_time(request, f, b) for f, b in zip(there, back, strict=True)] + [0]
    for c, stage in enumerate(stages):
        saved[c] += sum(numbers.made[stage.start : stage.stop]) - leaving[c]
    arriving = [0, *there]
    kept = [sum(parts) for parts in zip(saved, leaving, arriving, strict=True)]
    parameters = stage_parameters(request, starts)
    memory = []
    for rank, moments in enumerate(request.moments):
        mine = range(rank, count, request.num_stages)
        memory.append(
            resident(request, sum(parameters[c] for c in mine))
            + max(recompute_peak(request, stages[c]) for c in mine)
            + max(sum(n * kept[c] for n, c in zip(ns, mine, strict=True)) for ns in moments)
        )
    slowest = max(f + b + h for f, b, h in zip(forward, backward, hop_times, strict=True))
    return Partition(
        starts=tuple(starts),
        schedules=tuple((s.name, schedules[s.name]) for s in costs.streams),
        forward_seconds=tuple(t / PICOSECONDS for t in forward),
        backward_seconds=tuple(t / PICOSECONDS for t in backward),
        hop_seconds=tuple(t / PICOSECONDS for t in hop_times),
        hop_forward_bytes=(*there, 0),
        hop_backward_bytes=(*back, 0),
        parameter_bytes=tuple(parameters),
        activation_bytes=tuple(saved),
        sent_bytes=tuple(leaving),
        received_bytes=tuple(arriving),
        memory_bytes=tuple(memory),
        slowest=slowest,
        traffic_bytes=sum(there) + sum(back),
        unaligned_cuts=sum(not is_aligned(costs, schedules, start) for start in starts),
        aligned=are_aligned(costs, schedules, starts),
    )


def _moved_bytes(
    request: PlanRequest, starts: Sequence[int], crossing: Tensor
) -> tuple[list[int], list[int], list[int]]:
    """Bytes of what every stage makes for later ones, then over every hop: to the next stage, and of the gradients
    that come back. On one rank nothing travels.

    What `traffic` counts value by value, for all sources at once: every stage from the one that makes a source to the
    last that takes it takes it, so it walks there, or, where ranks keep values, until all have seen it.
    """
    count, ranks = len(starts), request.num_stages
    made, last, size = crossing
    made, last = torch.bucketize(torch.stack([made, last]), torch.tensor(starts), right=True) - 1
    leaving = torch.zeros(count + 1, dtype=torch.long).index_add_(0, made, size * (last > made))
    walked = (last - made).clamp(max=ranks - 1) if request.cache or ranks == 1 else last - made
    steps = torch.zeros(count + 1, dtype=torch.long).index_add_(0, made, size).index_add_(0, made + walked, -size)
    sent, there = leaving[:count].tolist(), steps.cumsum(0)[: count - 1].tolist()
    back = list(there)
    for value in carried_values(request.costs.carried, starts):
        sent[value.produced] += value.bytes
        for hop in hops_of(value, ranks, cache=request.cache) if ranks > 1 else ():
            there[hop] += value.bytes
            back[hop] += value.bytes * value.differentiable
    return sent, there, back


def hop_time(request: PlanRequest, forward: int, backward: int) -> int:
    """Picoseconds of one hop there and back: two messages. On one rank nothing travels."""
    if request.num_stages == 1:
        return 0
    device = request.device
    there, back = picoseconds(forward, device.link_bandwidth), picoseconds(backward, device.link_bandwidth)
    return 2 * picoseconds(device.link_latency, 1) + there + back


def stage_parameters(request: PlanRequest, starts: Sequence[int]) -> tuple[int, ...]:
    """Parameter bytes of every stage. A parameter that several places share counts once on each rank that has one."""
    costs = request.costs
    edges = pairwise((*starts, len(costs.sublayers)))
    found = [sum(s.parameter_bytes for s in costs.sublayers[a:b]) for a, b in edges]
    found[0] += costs.before.parameter_bytes
    found[-1] += costs.after.parameter_bytes
    for size, places in costs.tied:
        ranks: set[int] = set()
        for place in places:
            stage = {"before": 0, "after": len(starts) - 1}.get(place)
            stage = stage_of(int(place), starts) if stage is None else stage
            rank = stage % request.num_stages
            if ranks and rank not in ranks:  # the first place has counted it
                found[stage] += size
            ranks.add(rank)
    return tuple(found)


def resident(request: PlanRequest, parameter_bytes: Number) -> Number:
    """Bytes of parameters with their gradients and optimizer state."""
    return parameter_bytes + parameter_bytes * round(1024 * request.optimizer_factor) // 1024


def recompute_peak(request: PlanRequest, stage: range) -> int:
    """Activations of the one sublayer that is being run again."""
    return max(request.costs.sublayers[i].activation_bytes for i in stage) if request.recompute else 0


def is_aligned(costs: ModelCosts, schedules: Schedules, start: int) -> bool:
    """Whether a stage that begins there begins with a block."""
    stream = next(s for s in costs.streams if s.first <= start < s.first + s.count)
    return start - stream.first in schedules[stream.name].starts


def block_begins(costs: ModelCosts, schedules: Schedules) -> list[int]:
    """Sublayers of the chain with which a block begins."""
    return [s.first + start for s in costs.streams for start in schedules[s.name].starts]


def are_aligned(costs: ModelCosts, schedules: Schedules, starts: Sequence[int]) -> bool:
    """Whether stages begin where blocks do: all of them, or, where blocks are fewer, all blocks where stages do."""
    fewer, more = sorted((set(block_begins(costs, schedules)), set(starts)), key=len)
    return fewer <= more
