"""What a plan is judged by: the planner and its tests both ask here."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.model_costs import ModelCosts
from attnres_fx.partition.costs.stage_costs import stage_costs
from attnres_fx.partition.costs.unit_costs import PICOSECONDS, UnitCosts, unit_costs
from attnres_fx.partition.planner.request import PlanRequest
from attnres_fx.passes.schedule import DepthSchedule, even_starts


@dataclass(frozen=True)
class Partition:
    """Stages and blocks, and what they cost; tuples are per virtual stage unless they say "rank".

    Args:
        starts: First sublayer of each.
        block_layouts: Per stream its name and its blocks.
        forward_seconds: Of sublayers and depth reads, one microbatch.
        backward_seconds: The same, with what is recomputed.
        hop_seconds: Of the hop that leaves it, there and back; 0 for the last.
        hop_forward_bytes: On that hop, to the next stage, one microbatch.
        hop_backward_bytes: On that hop, of the gradients that come back.
        parameter_bytes: Of its parameters.
        activation_bytes: Of one microbatch, with the sources that no other stage takes.
        received_bytes: Of one microbatch, what arrives over the hop to it.
        memory_bytes: Per rank, of parameters, their gradients and optimizer state, and of all that the microbatches in
            flight keep at the fullest moment.
        slowest: Picoseconds of the slowest stage: the largest of forward + backward + hop, which is made small first.
        traffic_bytes: Over all hops, both ways, which is made small next.
        unaligned_cuts: Stages that begin inside a block, made few then.
        aligned: Whether every stage begins with a block, or, where blocks are fewer, every block with a stage.
        gap: How far `slowest` may be above the best there is, as a share of it; 0 where it is the best.
    """

    starts: tuple[int, ...]
    block_layouts: tuple[tuple[str, DepthSchedule], ...]
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    hop_seconds: tuple[float, ...]
    hop_forward_bytes: tuple[int, ...]
    hop_backward_bytes: tuple[int, ...]
    parameter_bytes: tuple[int, ...]
    activation_bytes: tuple[int, ...]
    received_bytes: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    slowest: int
    traffic_bytes: int
    unaligned_cuts: int
    aligned: bool
    gap: float = 0.0

    @property
    def slowest_seconds(self) -> float:
        """Seconds of the slowest stage, with the hop that leaves it."""
        return self.slowest / PICOSECONDS

    @property
    def stage_seconds(self) -> tuple[float, ...]:
        """Of each virtual stage, with the hop that leaves it."""
        parts = zip(self.forward_seconds, self.backward_seconds, self.hop_seconds, strict=True)
        return tuple(sum(part) for part in parts)

    @property
    def objective(self) -> tuple[object, ...]:
        """What is compared, first entries first: slowest stage, bytes, cuts inside blocks, then, so that one plan is
        the best: the earlier stages, the more blocks, the more even blocks."""
        return (
            self.slowest,
            self.traffic_bytes,
            self.unaligned_cuts,
            self.starts,
            tuple(block_order(layout.starts, layout.num_sublayers) for _, layout in self.block_layouts),
        )


def block_order(starts: Sequence[int], count: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """More blocks first; then, block by block, the start nearest to where blocks of even size would begin."""
    even = even_starts(count, len(starts))
    return -len(starts), tuple((abs(s - e), s) for s, e in zip(starts, even, strict=True))


def units_of(request: PlanRequest, block_layouts: BlockLayouts) -> UnitCosts:
    """Times and bytes of every sublayer with the reads it runs, as the request asks."""
    return unit_costs(request.costs, block_layouts, device=request.device, recompute=request.recompute)


def evaluate(
    request: PlanRequest, starts: Sequence[int], block_layouts: BlockLayouts, units: UnitCosts | None = None
) -> Partition:
    """Everything about one choice of stages and blocks, whether it fits the memory limit or not.

    units: of the same request and blocks, where they are known. Raises PlanError where a stage would be empty.
    """
    costs = request.costs
    stages = stage_costs(
        costs,
        units or units_of(request, block_layouts),
        starts,
        num_stages=request.num_stages,
        device=request.device,
        cache=request.cache,
    )
    activations = zip(stages.saved_bytes, stages.produced_bytes, stages.sent_bytes, strict=True)
    return Partition(
        starts=tuple(starts),
        block_layouts=tuple((s.name, block_layouts[s.name]) for s in costs.streams),
        forward_seconds=tuple(t / PICOSECONDS for t in stages.forward),
        backward_seconds=tuple(t / PICOSECONDS for t in stages.backward),
        hop_seconds=tuple(t / PICOSECONDS for t in stages.hops),
        hop_forward_bytes=stages.hop_forward_bytes,
        hop_backward_bytes=stages.hop_backward_bytes,
        parameter_bytes=stages.parameter_bytes,
        activation_bytes=tuple(saved + made - sent for saved, made, sent in activations),
        received_bytes=stages.received_bytes,
        memory_bytes=stages.memory_bytes(request.moments, request.optimizer_factor),
        slowest=stages.slowest,
        traffic_bytes=sum(stages.hop_forward_bytes) + sum(stages.hop_backward_bytes),
        unaligned_cuts=sum(not is_aligned(costs, block_layouts, start) for start in starts),
        aligned=are_aligned(costs, block_layouts, starts),
    )


def is_aligned(costs: ModelCosts, block_layouts: BlockLayouts, start: int) -> bool:
    """Whether a stage that begins there begins with a block."""
    stream = next(s for s in costs.streams if s.first <= start < s.first + s.count)
    return start - stream.first in block_layouts[stream.name].starts


def block_begins(costs: ModelCosts, block_layouts: BlockLayouts) -> list[int]:
    """Sublayers of the chain with which a block begins."""
    return [s.first + start for s in costs.streams for start in block_layouts[s.name].starts]


def are_aligned(costs: ModelCosts, block_layouts: BlockLayouts, starts: Sequence[int]) -> bool:
    """Whether stages begin where blocks do: all of them, or, where blocks are fewer, all blocks where stages do."""
    fewer, more = sorted((set(block_begins(costs, block_layouts)), set(starts)), key=len)
    return fewer <= more
