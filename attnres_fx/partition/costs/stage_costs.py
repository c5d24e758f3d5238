"""Seconds, bytes and memory of every virtual stage: the one place where they are computed.

The planner, the table of a plan, the check against the memory limit and the simulated timeline all read this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from attnres_fx.partition.costs.model_costs import DeviceSpeed, ModelCosts
from attnres_fx.partition.costs.traffic import carried_values, check_starts, stage_of
from attnres_fx.partition.costs.unit_costs import UnitCosts, picoseconds
from attnres_fx.partition.split.routes import hops_of

Number = TypeVar("Number", int, Tensor)


@dataclass(frozen=True)
class StageCosts:
    """What every virtual stage costs, per microbatch; times in picoseconds.

    Args:
        forward: Of its sublayers and their reads.
        backward: The same, with the recomputation.
        sublayer_backward: The part of backward without reads and recomputation.
        hop_forward: Of the message to the next stage; 0 at the last stage.
        hop_backward: Of the gradients that come back over that hop; 0 at the last stage.
        hop_forward_bytes: Of the message to the next stage.
        hop_backward_bytes: Of the gradients that come back.
        saved_bytes: Activations kept for backward.
        produced_bytes: Sources and carried values made here.
        sent_bytes: Those of them that other stages take.
        received_bytes: What arrives over the hop to it.
        parameter_bytes: Of its parameters; one that several places share counts once on each rank that has it.
        recomputed_bytes: Activations of the largest sublayer that is run again.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    sublayer_backward: tuple[int, ...]
    hop_forward: tuple[int, ...]
    hop_backward: tuple[int, ...]
    hop_forward_bytes: tuple[int, ...]
    hop_backward_bytes: tuple[int, ...]
    saved_bytes: tuple[int, ...]
    produced_bytes: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    received_bytes: tuple[int, ...]
    parameter_bytes: tuple[int, ...]
    recomputed_bytes: tuple[int, ...]

    @property
    def hops(self) -> tuple[int, ...]:
        """Picoseconds of the hop that leaves each stage, there and back."""
        return tuple(map(sum, zip(self.hop_forward, self.hop_backward, strict=True)))

    @property
    def slowest(self) -> int:
        """Picoseconds of the slowest stage with the hop that leaves it, there and back."""
        return max(map(sum, zip(self.forward, self.backward, self.hops, strict=True)))

    def memory_bytes(self, moments: Sequence[Sequence[Sequence[int]]], optimizer_factor: float) -> tuple[int, ...]:
        """Per rank: parameters, their gradients and optimizer state, and all that microbatches in flight keep.

        moments: per rank, the microbatches its stages keep at its fullest moments (`in_flight`).
        """
        parts = zip(self.saved_bytes, self.produced_bytes, self.received_bytes, strict=True)
        per_microbatch = [sum(part) for part in parts]
        memory = []
        for rank, fullest in enumerate(moments):
            own = range(rank, len(self.forward), len(moments))
            memory.append(
                resident_bytes(sum(self.parameter_bytes[c] for c in own), optimizer_factor)
                + max(self.recomputed_bytes[c] for c in own)
                + max(sum(n * per_microbatch[c] for n, c in zip(counts, own, strict=True)) for counts in fullest)
            )
        return tuple(memory)


def stage_costs(
    costs: ModelCosts,
    units: UnitCosts,
    starts: Sequence[int],
    *,
    num_stages: int,
    device: DeviceSpeed,
    cache: bool = True,
) -> StageCosts:
    """What every virtual stage costs.

    units: of the same costs and the blocks chosen. starts: first sublayer of each stage. num_stages: ranks P; stage c
    runs on rank c mod P. cache: whether ranks keep the values they have seen, so that hops carry each to a rank once.
    Raises PlanError where a stage would be empty.
    """
    check_starts(starts, len(costs.sublayers))
    stages = [range(a, b) for a, b in pairwise((*starts, len(costs.sublayers)))]

    def summed(per_sublayer: Sequence[int], before: int = 0, after: int = 0) -> tuple[int, ...]:
        sums = [sum(per_sublayer[stage.start : stage.stop]) for stage in stages]
        sums[0] += before
        sums[-1] += after
        return tuple(sums)

    before, after = units.before, units.after
    sent, forward, backward = _moved_bytes(costs, starts, units.crossing_sources, num_stages, cache)
    return StageCosts(
        forward=summed(units.forward, before.forward, after.forward),
        backward=summed(units.backward, before.backward, after.backward),
        sublayer_backward=summed(units.sublayer_backward, before.backward, after.backward),
        hop_forward=(*(hop_picoseconds(b, num_stages, device) for b in forward), 0),
        hop_backward=(*(hop_picoseconds(b, num_stages, device) for b in backward), 0),
        hop_forward_bytes=(*forward, 0),
        hop_backward_bytes=(*backward, 0),
        saved_bytes=summed(units.saved, before.saved, after.saved),
        produced_bytes=summed(units.produced),
        sent_bytes=tuple(sent),
        received_bytes=(0, *forward),
        parameter_bytes=stage_parameters(costs, starts, num_stages),
        recomputed_bytes=tuple(max(units.recomputed[stage.start : stage.stop]) for stage in stages),
    )


def _moved_bytes(
    costs: ModelCosts, starts: Sequence[int], sources: Tensor, num_stages: int, cache: bool
) -> tuple[list[int], list[int], list[int]]:
    """Bytes of what every stage makes for later ones, then over every hop: to the next stage, and of the gradients
    that come back. On one rank nothing travels.

    This is what `traffic` counts value by value, here for all sources at once. Every stage between the one that makes a
    source and the last one that takes it takes it too. So it walks all of that way or, where ranks keep values, until
    every rank has seen it.
    """
    count = len(starts)
    maker, last, size = sources
    maker, last = torch.bucketize(torch.stack([maker, last]), torch.tensor(starts), right=True) - 1
    outputs = torch.zeros(count + 1, dtype=torch.long).index_add_(0, maker, size * (last > maker))
    hops = (last - maker).clamp(max=num_stages - 1) if cache or num_stages == 1 else last - maker
    steps = torch.zeros(count + 1, dtype=torch.long).index_add_(0, maker, size).index_add_(0, maker + hops, -size)
    sent, forward = outputs[:count].tolist(), steps.cumsum(0)[: count - 1].tolist()
    backward = list(forward)
    for value in carried_values(costs.carried, starts):
        sent[value.produced] += value.bytes
        for hop in hops_of(value, num_stages, cache=cache) if num_stages > 1 else ():
            forward[hop] += value.bytes
            backward[hop] += value.bytes * value.differentiable
    return sent, forward, backward


def hop_picoseconds(count: int, num_stages: int, device: DeviceSpeed) -> int:
    """Picoseconds of one message of so many bytes to a neighbour. On one rank nothing travels."""
    if num_stages == 1:
        return 0
    return picoseconds(device.link_latency, 1) + picoseconds(count, device.link_bandwidth)


def stage_parameters(costs: ModelCosts, starts: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Parameter bytes of every stage. A parameter that several places share counts once on each rank that has one."""
    edges = pairwise((*starts, len(costs.sublayers)))
    bytes_of_stages = [sum(s.parameter_bytes for s in costs.sublayers[a:b]) for a, b in edges]
    bytes_of_stages[0] += costs.before.parameter_bytes
    bytes_of_stages[-1] += costs.after.parameter_bytes
    for size, places in costs.tied:
        ranks: set[int] = set()
        for place in places:
            stage = {"before": 0, "after": len(starts) - 1}.get(place)
            stage = stage_of(int(place), starts) if stage is None else stage
            rank = stage % num_stages
            if ranks and rank not in ranks:  # the first place has counted it
                bytes_of_stages[stage] += size
            ranks.add(rank)
    return tuple(bytes_of_stages)


def resident_bytes(parameter_bytes: Number, optimizer_factor: float) -> Number:
    """Bytes of parameters with their gradients and optimizer state."""
    return parameter_bytes + parameter_bytes * round(1024 * optimizer_factor) // 1024
