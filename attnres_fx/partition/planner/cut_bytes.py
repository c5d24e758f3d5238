"""What crosses a cut at each position of the chain, without looking at stages: each value from where it is made to the
last cut that a later read sees it across."""

from collections.abc import Sequence
from typing import NamedTuple

from attnres_fx.partition.costs.model_costs import ModelCosts, StreamCost
from attnres_fx.partition.planner.request import Schedules


class CrossingValue(NamedTuple):
    """A value that crosses the cuts made + 1 to last. made: the sublayer that makes it. bytes: per microbatch."""

    made: int
    last: int
    bytes: int
    differentiable: bool = True


def crossing_values(costs: ModelCosts, schedules: Schedules) -> list[CrossingValue]:
    """Everything that crosses some cut: sources of every stream, and values carried besides."""
    last = len(costs.sublayers) - 1
    found = [
        CrossingValue(max(v.produced, 0), min(max(v.used), last), v.bytes, v.differentiable)
        for v in costs.carried
        if v.used
    ]
    return found + crossing_sources(costs.streams, schedules)


def crossing_sources(streams: Sequence[StreamCost], schedules: Schedules) -> list[CrossingValue]:
    """The sources of every stream that cross some cut; each stage that begins at one of these cuts takes it."""
    found: list[CrossingValue] = []
    for stream in streams:
        schedule, end = schedules[stream.name], stream.count - 1
        spans: list[tuple[int, int]] = [(0, end)]
        if schedule.variant == "full":
            spans += ((i, end) for i in range(end))
        elif schedule.variant == "block":
            spans += ((b.stop - 1, end) for b in schedule.blocks)
            spans += ((i, i + 1) for b in schedule.blocks for i in b[:-1])
        else:
            spans = [(max(b.start - 1, 0), b.stop - 1) for b in schedule.blocks]
            spans += ((i, b.stop - 1) for b in schedule.blocks for i in b[:-1])
        found += (
            CrossingValue(stream.first + made, stream.first + last, stream.value_bytes)
            for made, last in spans
            if last > made
        )
    return found


def crossing_bytes(values: Sequence[CrossingValue], count: int, since: int = 0) -> tuple[list[int], list[int]]:
    """Bytes that cross a cut at each position 0 to `count`, and of their gradients on the way back.

    since: values that earlier sublayers made are left out.
    """
    forward, backward = [0] * (count + 2), [0] * (count + 2)
    for value in values:
        if value.made < since:
            continue
        for totals in (forward, backward)[: 1 + value.differentiable]:
            totals[value.made + 1] += value.bytes
            totals[value.last + 1] -= value.bytes
    for totals in (forward, backward):
        for position in range(1, count + 1):
            totals[position] += totals[position - 1]
    return forward[: count + 1], backward[: count + 1]
