"""What a plan is asked for, and whether it can be asked for at all."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import get_args

from attnres_fx.config import Variant
from attnres_fx.errors import PlanError
from attnres_fx.partition.checked_values import checked_amount, checked_choice, checked_flag
from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.in_flight import in_flight
from attnres_fx.partition.costs.model_costs import DeviceSpeed, ModelCosts
from attnres_fx.partition.costs.traffic import check_starts
from attnres_fx.partition.pipeline_schedule import check_schedule
from attnres_fx.passes.depth_source import Window
from attnres_fx.passes.schedule import DEFAULT_BLOCKS, DepthSchedule

#: Gradient and AdamW's two moments, each as large as the parameter.
OPTIMIZER_FACTOR = 3.0
#: Times in picoseconds, and bytes, must fit machine integers when they are added up and weighed against each other.
_LARGEST = 2**60


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is to be planned.

    Args:
        costs: Of the model, per microbatch.
        num_stages: Ranks P.
        num_microbatches: Of one step, M.
        virtual_stages: Stages on each rank, V; there are C = P * V in all.
        pipeline_schedule: As PyTorch names it.
        device: Speeds of every rank.
        variant: Which sources a read sees.
        window: Which of those; None for all.
        block_layouts: Blocks of each stream by its name, where they are given; None chooses them (one stream), or
            takes each stream's only ones (`full`).
        num_blocks: With free blocks, how many, or (fewest, most).
        starts: First sublayer of each virtual stage, where they are given.
        align: "prefer" lets blocks span stages where that is faster; "require" cuts at the ends of blocks alone.
        memory_limit: Bytes a rank, or None.
        optimizer_factor: Bytes of gradient and optimizer state per byte of parameter; 3.0 is a gradient and AdamW's
            two moments in the parameter's own type.
        recompute: Whether each sublayer keeps its input alone and is run again in backward.
        cache: Whether ranks keep the values they have seen, so that hops carry each to a rank once.
    """

    costs: ModelCosts
    num_stages: int
    num_microbatches: int
    virtual_stages: int = 1
    pipeline_schedule: str = "1F1B"
    device: DeviceSpeed = field(default_factory=DeviceSpeed)
    variant: Variant = "block"
    window: Window | None = None
    block_layouts: BlockLayouts | None = None
    num_blocks: int | tuple[int, int] | None = None
    starts: tuple[int, ...] | None = None
    align: str = "prefer"
    memory_limit: int | None = None
    optimizer_factor: float = OPTIMIZER_FACTOR
    recompute: bool = False
    cache: bool = True

    @property
    def num_virtual(self) -> int:
        """Virtual stages of all ranks, C."""
        return self.num_stages * self.virtual_stages

    @property
    def num_sublayers(self) -> int:
        return len(self.costs.sublayers)

    @cached_property
    def moments(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Per rank, the microbatches it keeps at its fullest moments (`in_flight`)."""
        return tuple(
            in_flight(self.pipeline_schedule, self.num_stages, self.virtual_stages, self.num_microbatches, rank)
            for rank in range(self.num_stages)
        )

    @cached_property
    def known_layouts(self) -> BlockLayouts | None:
        """Blocks of every stream where there is no choice, else None."""
        if self.variant == "full":
            return {s.name: self.layout(tuple(range(s.count)), s.count) for s in self.costs.streams}
        return self.block_layouts

    def layout(self, starts: tuple[int, ...], count: int) -> DepthSchedule:
        """Blocks that begin at these of `count` sublayers, read as is asked for."""
        return DepthSchedule(self.variant, starts, count, self.window)

    @cached_property
    def block_counts(self) -> range:
        """Numbers of blocks to choose from, where blocks are chosen: by default blocks of ceil(L / 8) sublayers."""
        if self.num_blocks is None:
            size = -(-self.num_sublayers // DEFAULT_BLOCKS)
            few = -(-self.num_sublayers // size)
            return range(few, few + 1)
        low, high = (self.num_blocks, self.num_blocks) if isinstance(self.num_blocks, int) else self.num_blocks
        return range(low, high + 1)


def check_request(request: PlanRequest) -> None:
    """Refuse what no plan can be made of.

    Raises:
        PlanError: The error says what to change, and to what.
    """
    check_schedule(
        request.pipeline_schedule,
        num_stages=request.num_stages,
        virtual_stages=request.virtual_stages,
        num_microbatches=request.num_microbatches,
    )
    _check_choices(request)
    _check_sizes(request)
    _check_starts(request)
    _check_blocks(request)


def _check_choices(request: PlanRequest) -> None:
    checked_choice("align", request.align, ("prefer", "require"))
    checked_choice("variant", request.variant, get_args(Variant))
    checked_amount(
        "optimizer_factor (bytes of gradient and optimizer state per byte of parameter)", request.optimizer_factor
    )
    for name in ("recompute", "cache"):
        checked_flag(name, getattr(request, name))


def _check_sizes(request: PlanRequest) -> None:
    costs, device = request.costs, request.device
    if request.num_virtual > request.num_sublayers:
        raise PlanError(
            f"num_stages={request.num_stages} times virtual_stages={request.virtual_stages} are {request.num_virtual} "
            f"stages, more than the model's {request.num_sublayers} sublayers: {_fewer_stages(request)}."
        )
    parts = (*costs.sublayers, costs.before, costs.after)
    cut_bytes = 2 * (sum(s.value_bytes * (s.count + 1) for s in costs.streams) + sum(v.bytes for v in costs.carried))
    seconds = sum(2 * p.forward_flops + p.backward_flops for p in parts) / device.flops
    seconds += sum(4 * s.value_bytes * (s.count + 1) ** 2 for s in costs.streams) / device.memory_bandwidth
    seconds += cut_bytes / device.link_bandwidth + 2 * device.link_latency
    if seconds * 10**12 > _LARGEST:
        raise PlanError(
            f"one microbatch might take {seconds:.3g} s: give DeviceSpeed in operations a second, bytes a second and "
            f"seconds a message."
        )
    memory = float(sum(p.activation_bytes for p in parts) * request.num_microbatches)
    memory += sum(p.parameter_bytes for p in parts) * (2 + request.optimizer_factor) * 1024
    if memory + cut_bytes * request.num_microbatches + cut_bytes * (request.num_virtual + 1) ** 2 > _LARGEST:
        raise PlanError(
            "the bytes of the model are too many to be added up: give costs in bytes, and "
            "optimizer_factor in bytes per byte of parameter."
        )


def _fewer_stages(request: PlanRequest) -> str:
    most = request.num_sublayers // request.virtual_stages
    if most >= 1:
        return f"choose num_stages of at most {most}" + (
            ", or fewer virtual_stages" if request.virtual_stages > 1 else ""
        )
    return f"choose num_stages times virtual_stages of at most {request.num_sublayers}"


def _check_starts(request: PlanRequest) -> None:
    starts = request.starts
    if starts is None:
        return
    if len(starts) != request.num_virtual:
        raise PlanError(
            f"{len(starts)} stage starts are given for num_stages={request.num_stages} times "
            f"virtual_stages={request.virtual_stages} = {request.num_virtual} stages: give one each, the first 0."
        )
    for i, (start, stop) in enumerate(zip(starts, (*starts[1:], request.num_sublayers), strict=True)):
        if stop <= start:
            raise PlanError(
                f"stage {i} would be empty: it starts at sublayer {start} and the next at {stop}, of "
                f"{request.num_sublayers} sublayers; move one of the two stage starts {starts}."
            )
    check_starts(starts, request.num_sublayers)


def _check_blocks(request: PlanRequest) -> None:
    if request.block_layouts is not None and request.variant != "full":
        _check_layouts(request, request.block_layouts)
        if request.num_blocks is not None:
            raise PlanError("the blocks are given, so num_blocks means nothing: leave one of the two out.")
    if request.known_layouts is None:
        _check_free_blocks(request)


def _check_layouts(request: PlanRequest, layouts: BlockLayouts) -> None:
    for stream in request.costs.streams:
        layout = layouts.get(stream.name)
        if layout is None or layout != request.layout(layout.starts, stream.count):
            raise PlanError(
                f"the stream {stream.name!r} needs blocks of variant {request.variant!r} over its {stream.count} "
                f"sublayers; given is {layout}."
            )
        begins = layout.starts
        rising = all(a < b for a, b in pairwise((*begins, stream.count)))
        if not begins or begins[0] != 0 or not rising:
            raise PlanError(
                f"the blocks of {stream.name!r} begin at {begins!r:.80}: they must begin with 0, rise, and stay "
                f"below its {stream.count} sublayers."
            )


def _check_free_blocks(request: PlanRequest) -> None:
    streams = request.costs.streams
    if len(streams) != 1:
        raise PlanError(
            f"blocks are chosen for models of one stream, and this one has {len(streams)} "
            f"({', '.join(s.name for s in streams)}): give the blocks of each stream."
        )
    counts, most = request.block_counts, request.num_sublayers
    if not 1 <= counts.start < counts.stop <= most + 1:
        raise PlanError(
            f"num_blocks={request.num_blocks!r:.80} must be a number, or (fewest, most), between 1 and the {most} "
            f"sublayers."
        )
