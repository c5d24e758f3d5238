"""What travels between the ranks of a pipeline, in bytes, counted before anything runs.

The values come from `passes/schedule.py`: what a virtual stage takes from earlier ones is what must cross the cut at
its start. How far each of them walks is counted three ways:

- naive: every hop carries all that any later stage needs;
- cached: what the receiving rank has not received before (arXiv 2603.15031, section 4.1), which sends a value once
  more to the rank that made it;
- exact: what the receiving rank has neither received nor made. This is what the runtime sends.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tabulate import tabulate

from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.model_costs import CarriedValue, StreamCost
from attnres_fx.partition.split.routes import StageValue, hops_of
from attnres_fx.passes.depth_source import Source

LABELS_SHOWN = 6


@dataclass(frozen=True)
class HopCount:
    """What one way of sending puts on every hop, per microbatch.

    Args:
        values: Per hop (named by the stage it leaves) the names of what travels.
        forward: Per hop, bytes to the next stage.
        backward: Per hop, bytes of the gradients that come back.
    """

    values: tuple[tuple[str, ...], ...]
    forward: tuple[int, ...]
    backward: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all hops, both ways."""
        return sum(self.forward) + sum(self.backward)

    @property
    def peak(self) -> int:
        """Bytes of the fullest hop, in one direction."""
        return max((*self.forward, *self.backward), default=0)


@dataclass(frozen=True)
class Traffic:
    """Bytes between stages and bytes kept, per microbatch.

    Args:
        num_stages: Ranks, P.
        virtual_stages: Stages on each rank, V.
        values: Every value that a later stage takes from an earlier one.
        naive: The count where every hop carries all that any later stage needs.
        cached: The count of what the receiving rank has not received before.
        exact: The count of what the receiving rank has neither received nor made.
        cache_bytes: Per rank, everything it receives or makes for later stages, each value once, whatever number of its
            virtual stages use it.
    """

    num_stages: int
    virtual_stages: int
    values: tuple[StageValue, ...]
    naive: HopCount
    cached: HopCount
    exact: HopCount
    cache_bytes: tuple[int, ...]

    def receive_buffer_bytes(self, num_microbatches: int, *, cache: bool = True) -> tuple[int, ...]:
        """What PyTorch's stages set aside on each rank to receive into, as long as they live.

        That is room for the outputs and the gradients of every microbatch, whenever they arrive.

        Args:
            num_microbatches: Of one step.
            cache: Whether hops carry the exact count; else the naive one.

        Returns:
            Bytes, per rank.
        """
        hops, held = self.exact if cache else self.naive, [0] * self.num_stages
        for hop, (forward, backward) in enumerate(zip(hops.forward, hops.backward, strict=True)):
            held[(hop + 1) % self.num_stages] += num_microbatches * forward
            held[hop % self.num_stages] += num_microbatches * backward
        return tuple(held)

    def table(self) -> str:
        """Every hop with what travels over it, then totals and peaks.

        Returns:
            Lines to print; bytes are per microbatch.
        """
        labels = {v.name: v.label or v.name for v in self.values}
        ranks = self.num_stages
        rows: list[list[str]] = [
            [
                f"{hop} → {hop + 1}",
                f"{hop % ranks} → {(hop + 1) % ranks}",
                *(size(c.forward[hop]) for c in (self.exact, self.cached, self.naive)),
                size(self.exact.backward[hop]),
                _short([labels[n] for n in names]),
            ]
            for hop, names in enumerate(self.exact.values)
        ]
        counts = (self.exact, self.cached, self.naive)
        rows.append(["all", "", *(size(sum(c.forward)) for c in counts), size(sum(self.exact.backward)), ""])
        rows.append(
            [
                "peak",
                "",
                *(size(max(c.forward, default=0)) for c in counts),
                size(max(self.exact.backward, default=0)),
                "",
            ]
        )
        headers = ["stages", "ranks", "exact", "paper's cache", "naive", "gradients", "exact count: values"]
        return tabulate(rows, headers=headers, disable_numparse=True)


def stage_values(
    streams: Sequence[StreamCost],
    block_layouts: BlockLayouts | None,
    starts: Sequence[int],
    *,
    carried: Sequence[CarriedValue] = (),
) -> tuple[StageValue, ...]:
    """Every value that a later virtual stage takes from an earlier one, oldest first.

    Every stream begins with a root of its own, made in the stage of its first sublayer.

    Args:
        streams: In the order of the chain.
        block_layouts: By stream name; None for the plain residual, whose state is the one thing that crosses a cut.
        starts: First sublayer of each virtual stage.
        carried: What travels besides the streams.

    Raises:
        PlanError: The stages or blocks do not fit the streams.
    """
    check_starts(starts, sum(s.count for s in streams))
    takers: dict[tuple[StreamCost, Source], list[int]] = {}
    for stage, start in enumerate(starts):
        stream = next(s for s in streams if s.first <= start < s.first + s.count)
        for source in _carried_sources(stream, block_layouts, start - stream.first):
            takers.setdefault((stream, source), []).append(stage)
    values = []
    for (stream, source), used in takers.items():
        if block_layouts is None:
            maker, label = max(source.stop - 1, 0), f"h[:{source.stop}]"
        else:
            maker, label = block_layouts[stream.name].maker_of(source), str(source)
        name = f"{stream.name}:{label}"
        values.append(
            StageValue(name, stage_of(stream.first + maker, starts), tuple(used), stream.value_bytes, label=label)
        )
    return (*values, *carried_values(carried, starts))


def carried_values(carried: Sequence[CarriedValue], starts: Sequence[int]) -> list[StageValue]:
    """Of what travels besides the streams, what some stage takes from an earlier one."""
    values = []
    for value in carried:
        produced = stage_of(max(value.produced, 0), starts)  # what precedes the first sublayer runs beside it
        used = sorted({stage_of(u, starts) for u in value.used} - {produced})
        if used:
            values.append(StageValue(value.name, produced, tuple(used), value.bytes, value.differentiable, value.name))
    return values


def check_starts(starts: Sequence[int], num_sublayers: int) -> None:
    """Raises PlanError unless every virtual stage has a sublayer."""
    if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)) or starts[-1] >= num_sublayers:
        raise PlanError(
            f"the stage starts {tuple(starts)} must begin with 0, rise, and stay below the {num_sublayers} sublayers, "
            f"so that no stage is empty: give other starts, or fewer of them."
        )


def stage_of(sublayer: int, starts: Sequence[int]) -> int:
    """The virtual stage that runs a sublayer of the chain."""
    return bisect_right(starts, sublayer) - 1


def _carried_sources(stream: StreamCost, block_layouts: BlockLayouts | None, position: int) -> Iterable[Source]:
    """What a stage that starts at this read position of a stream takes: all that crosses there, as its first read
    sees it all; later ones see less of it."""
    if position == 0:
        return ()
    if block_layouts is None:
        return (Source("partial", 0, 0, position),)
    layout = block_layouts.get(stream.name)
    if layout is None or layout.num_sublayers != stream.count:
        wrong = "there is none" if layout is None else f"it is of {layout.num_sublayers}"
        raise PlanError(f"the stream {stream.name!r} needs a schedule of its {stream.count} sublayers; {wrong}.")
    return layout.carried(position)


def count_traffic(values: Sequence[StageValue], *, num_stages: int, virtual_stages: int = 1) -> Traffic:
    """Counts what travels over every hop, the three ways of this file's head."""
    hops = range(num_stages * virtual_stages - 1)

    def count(route: Mapping[str, range]) -> HopCount:
        over = [[v for v in values if hop in route[v.name]] for hop in hops]
        return HopCount(
            tuple(tuple(v.name for v in vs) for vs in over),
            tuple(sum(v.bytes for v in vs) for vs in over),
            tuple(sum(v.bytes for v in vs if v.differentiable) for vs in over),
        )

    # On one rank stages hand everything over in memory.
    wire = num_stages > 1
    naive = {v.name: hops_of(v, num_stages, cache=False) if wire else range(0) for v in values}
    cached = {v.name: _hops_as_in_paper(v, num_stages) if wire else range(0) for v in values}
    exact = {v.name: hops_of(v, num_stages) if wire else range(0) for v in values}
    kept = [0] * num_stages
    for v in values:
        for stage in (v.produced, *(hop + 1 for hop in exact[v.name])):
            kept[stage % num_stages] += v.bytes
    return Traffic(num_stages, virtual_stages, tuple(values), count(naive), count(cached), count(exact), tuple(kept))


def _hops_as_in_paper(value: StageValue, num_stages: int) -> range:
    """Hops under a cache of what was received alone: the walk passes the rank that made the value once more."""
    arrivals = [(u - value.produced - 1) % num_stages + 1 for u in value.used]
    return range(value.produced, value.produced + max(arrivals, default=0))


def size(count: float) -> str:
    """Bytes for a reader, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _short(labels: Sequence[str]) -> str:
    if len(labels) <= LABELS_SHOWN:
        return ", ".join(labels)
    return f"{labels[0]}, {labels[1]} … {labels[-1]} ({len(labels)} values)"
