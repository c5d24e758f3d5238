"""What crosses a cut at each position of the chain, without looking at stages: each value from where it is made to the
last cut that a later read sees it across."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from attnres_fx.partition.costs.model_costs import ModelCosts, StreamCost
from attnres_fx.passes.schedule import DepthSchedule

#: The blocks of each stream, by its name.
BlockLayouts = Mapping[str, DepthSchedule]


class CrossingValue(NamedTuple):
    """A value that crosses the cuts `maker + 1` to `last`.

    Args:
        maker: The sublayer that makes it.
        last: The last cut that it crosses, by the sublayer that begins there.
        bytes: Per microbatch.
        differentiable: Whether its gradient crosses the same cuts on the way back.
    """

    maker: int
    last: int
    bytes: int
    differentiable: bool = True


def crossing_values(costs: ModelCosts, block_layouts: BlockLayouts) -> list[CrossingValue]:
    """Everything that crosses some cut: sources of every stream, and values carried besides."""
    last = len(costs.sublayers) - 1
    carried = [
        CrossingValue(max(v.produced, 0), min(max(v.used), last), v.bytes, v.differentiable)
        for v in costs.carried
        if v.used
    ]
    return carried + crossing_sources(costs.streams, block_layouts)


def crossing_sources(streams: Sequence[StreamCost], block_layouts: BlockLayouts | None) -> list[CrossingValue]:
    """The sources of every stream that cross some cut; each stage that begins at one of these cuts takes it.

    Args:
        streams: Runs of the chain.
        block_layouts: By stream name; None for the plain residual, whose state is the one thing that crosses a cut.
    """
    return [
        CrossingValue(stream.first + maker, stream.first + last, stream.value_bytes)
        for stream in streams
        for maker, last in _spans(stream, block_layouts)
    ]


def _spans(stream: StreamCost, block_layouts: BlockLayouts | None) -> list[tuple[int, int]]:
    if block_layouts is None:
        return [(i, i + 1) for i in range(stream.count - 1)]
    return [(span.maker, span.last) for span in block_layouts[stream.name].spans]


def cut_bytes(values: Sequence[CrossingValue], count: int, since: int = 0) -> tuple[list[int], list[int]]:
    """Bytes that cross a cut at each position 0 to `count`, and of their gradients on the way back.

    Args:
        values: What crosses cuts.
        count: Sublayers of the chain.
        since: Values that earlier sublayers make are left out.
    """
    forward, backward = [0] * (count + 2), [0] * (count + 2)
    for value in values:
        if value.maker < since:
            continue
        for totals in (forward, backward)[: 1 + value.differentiable]:
            totals[value.maker + 1] += value.bytes
            totals[value.last + 1] -= value.bytes
    for totals in (forward, backward):
        for position in range(1, count + 1):
            totals[position] += totals[position - 1]
    return forward[: count + 1], backward[: count + 1]
