"""Times and bytes of every sublayer with the depth reads it runs.

Times are whole picoseconds, so that sums do not depend on their order and equal plans compare equal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from attnres_fx.partition.costs.cut_bytes import BlockLayouts, crossing_sources
from attnres_fx.partition.costs.model_costs import DeviceSpeed, ModelCosts, StreamCost, SublayerCost
from attnres_fx.passes.lowering.block_cost import backward_passes, forward_passes

PICOSECONDS = 10**12


@dataclass(frozen=True)
class EndCosts:
    """What precedes the chain or follows it.

    Args:
        forward: Picoseconds.
        backward: Picoseconds.
        saved: Bytes of activations kept for backward.
    """

    forward: int
    backward: int
    saved: int

    @property
    def work(self) -> int:
        """Picoseconds, both ways."""
        return self.forward + self.backward


@dataclass(frozen=True)
class UnitCosts:
    """Times and bytes of every sublayer with the depth reads it runs, for one microbatch.

    Args:
        forward: Picoseconds.
        backward: Picoseconds, with the recomputation.
        sublayer_backward: Picoseconds of the sublayer's own backward, without reads and recomputation.
        saved: Bytes of activations kept for backward.
        produced: Bytes of the sources it makes.
        recomputed: Bytes of activations that exist while it is run again, 0 where it is not.
        before: Of what precedes the chain, which is never run again.
        after: Of what follows the chain, which is never run again.
        crossing_sources: [3, N]. Of each source that crosses a cut, the sublayer that makes it, the last cut, bytes.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    sublayer_backward: tuple[int, ...]
    saved: tuple[int, ...]
    produced: tuple[int, ...]
    recomputed: tuple[int, ...]
    before: EndCosts
    after: EndCosts
    crossing_sources: Tensor


def unit_costs(
    costs: ModelCosts, block_layouts: BlockLayouts | None, *, device: DeviceSpeed, recompute: bool = False
) -> UnitCosts:
    """Times and bytes of every sublayer with the reads it runs.

    Args:
        costs: Of the model, per microbatch.
        block_layouts: By stream name; None for the plain residual, which reads nothing.
        device: Speeds.
        recompute: Whether sublayers keep one value of their stream and run forward once more in backward.
    """
    own = [picoseconds(s.backward_flops, device.flops) for s in costs.sublayers]
    forward = [picoseconds(s.forward_flops, device.flops) for s in costs.sublayers]
    backward = [_backward_with_recompute(s, device) for s in costs.sublayers] if recompute else list(own)
    saved = [s.activation_bytes for s in costs.sublayers]
    produced = [0] * len(saved)
    for stream in costs.streams:
        # One number a value, so that times are linear in the number of sources.
        value = picoseconds(stream.value_bytes, device.memory_bandwidth)
        produced[stream.first] += stream.value_bytes  # the root
        for sublayer in range(stream.first, stream.first + stream.count):
            # Every sublayer makes one source: its output, or the sum of its block so far.
            produced[sublayer] += stream.value_bytes
            if recompute:
                saved[sublayer] = stream.value_bytes
        for reader, sources, ends_block in _reads(stream, block_layouts):
            forward[reader] += forward_passes(sources) * value
            backward[reader] += backward_passes(sources) * value
            if ends_block:
                produced[reader] += stream.value_bytes  # the summary
    for carried in costs.carried:
        produced[max(carried.produced, 0)] += carried.bytes
    spans = [(v.maker, v.last, v.bytes) for v in crossing_sources(costs.streams, block_layouts)]
    return UnitCosts(
        forward=tuple(forward),
        backward=tuple(backward),
        sublayer_backward=tuple(own),
        saved=tuple(saved),
        produced=tuple(produced),
        recomputed=tuple(s.activation_bytes if recompute else 0 for s in costs.sublayers),
        before=_end_costs(costs.before, device),
        after=_end_costs(costs.after, device),
        crossing_sources=torch.tensor(spans, dtype=torch.long).reshape(-1, 3).T,
    )


def _reads(stream: StreamCost, block_layouts: BlockLayouts | None) -> Iterator[tuple[int, int, bool]]:
    """Of each read: the sublayer that runs it, how many sources it has, and whether it stands at a block's end."""
    if block_layouts is None:
        return
    layout = block_layouts[stream.name]
    for position in range(1, stream.count + 1):
        yield stream.first + layout.reader_of(position), layout.num_sources(position), layout.ends_block(position)


def _backward_with_recompute(part: SublayerCost, device: DeviceSpeed) -> int:
    return picoseconds(part.backward_flops + part.forward_flops, device.flops)


def _end_costs(part: SublayerCost, device: DeviceSpeed) -> EndCosts:
    return EndCosts(
        picoseconds(part.forward_flops, device.flops),
        picoseconds(part.backward_flops, device.flops),
        part.activation_bytes,
    )


@lru_cache(maxsize=1 << 16)
def picoseconds(count: float, per_second: float) -> int:
    """Time of so many operations or bytes at a speed."""
    return round(Fraction(count) / Fraction(per_second) * PICOSECONDS)
