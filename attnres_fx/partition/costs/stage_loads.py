"""Seconds and bytes of every virtual stage, from a model's costs and a device's speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnres_fx.partition.costs.model_costs import DeviceSpeed, ModelCosts, StreamCost
from attnres_fx.partition.costs.traffic import Traffic, check_starts, stage_of
from attnres_fx.passes.schedule import DepthSchedule

#: Share of a backward's operations that are for weights: one of the two products that belong to each of the forward.
WEIGHT_SHARE = 0.5


@dataclass(frozen=True)
class StageLoad:
    """What one virtual stage costs, per microbatch: seconds and bytes.

    backward_input, backward_weight: the two parts; a backward in one takes their sum. send_forward: the hop of its
    output to the next stage. send_backward: the hop of its input's gradient to the stage before. activation_bytes:
    kept from forward to backward. received_bytes, produced_bytes: of values kept for this rank's stages, by what they
    arrive with or are made in; each value counts in one stage of a rank.
    """

    forward: float
    backward_input: float
    backward_weight: float = 0.0
    send_forward: float = 0.0
    send_backward: float = 0.0
    activation_bytes: int = 0
    received_bytes: int = 0
    produced_bytes: int = 0


def stage_loads(
    costs: ModelCosts,
    starts: Sequence[int],
    schedules: Mapping[str, DepthSchedule] | None,
    traffic: Traffic,
    *,
    device: DeviceSpeed | None = None,
    cache: bool = True,
    weight_share: float = WEIGHT_SHARE,
) -> tuple[StageLoad, ...]:
    """One load per virtual stage, for `simulate`.

    starts: first sublayer of each stage. schedules: by stream name; None for the plain residual, which reads nothing.
    traffic: of the same stages. cache: whether ranks keep values and hops carry the exact count; else the naive one.
    weight_share: of a backward's operations, where it is in two parts; a read's own backward is all in the first.
    """
    check_starts(starts, len(costs.sublayers))
    device = device or DeviceSpeed()
    last = len(starts) - 1
    forward, backward, saved = ([0.0] * len(starts) for _ in range(3))
    placed = [(stage_of(i, starts), s) for i, s in enumerate(costs.sublayers)]
    for stage, part in (*placed, (0, costs.before), (last, costs.after)):
        forward[stage] += part.forward_flops / device.flops
        backward[stage] += part.backward_flops / device.flops
        saved[stage] += part.activation_bytes
    inputs = [(1 - weight_share) * seconds for seconds in backward]
    for stream in costs.streams if schedules is not None else ():
        schedule = schedules[stream.name]  # type: ignore[index]
        for position in range(1, stream.count + 1):
            sources = len(schedule.sources(position))
            stage = stage_of(reading_sublayer(stream, schedule, position), starts)
            forward[stage] += (sources + 1) * stream.value_bytes / device.memory_bandwidth
            inputs[stage] += (3 * sources + 1) * stream.value_bytes / device.memory_bandwidth
    hops = traffic.exact if cache else traffic.naive
    produced = [sum(v.bytes for v in traffic.values if v.produced == c) for c in range(len(starts))]
    return tuple(
        StageLoad(
            forward=forward[c],
            backward_input=inputs[c],
            backward_weight=weight_share * backward[c],
            send_forward=_hop_seconds(hops.forward[c], device) if c < last else 0.0,
            send_backward=_hop_seconds(hops.backward[c - 1], device) if c else 0.0,
            activation_bytes=round(saved[c]),
            received_bytes=hops.forward[c - 1] if c else 0,
            produced_bytes=produced[c],
        )
        for c in range(len(starts))
    )


def reading_sublayer(stream: StreamCost, schedule: DepthSchedule, position: int) -> int:
    """The sublayer of the chain whose stage runs a read: the one it opens, or, for the last read and for those at a
    block's end in `local`, the one it follows."""
    closes_block = schedule.variant == "local" and position > 0 and position in schedule.starts
    return stream.first + (position - 1 if closes_block or position == stream.count else position)


def _hop_seconds(count: int, device: DeviceSpeed) -> float:
    return device.link_latency + count / device.link_bandwidth
