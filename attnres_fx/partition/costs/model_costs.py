"""What the planner, the traffic model and the timeline know of a model: plain numbers, no graph and no torch.

The sublayers of all streams that are not nested in another's sublayer stand in one chain, in the order in which they
run. Virtual stages are runs of that chain; what precedes the first sublayer (embedding) goes to the first of them,
what follows the last (final norm, head) to the last.
"""

from dataclasses import dataclass

from attnres_fx.errors import PlanError
from attnres_fx.partition.checked_values import (
    checked_count,
    checked_fields,
    checked_index,
    checked_items,
    checked_record,
    checked_text,
)


@dataclass(frozen=True)
class SublayerCost:
    """One sublayer, or what precedes the first or follows the last; per microbatch, without its depth read.

    Args:
        name: Module path of the read that opens it.
        forward_flops: Floating-point operations of its forward.
        backward_flops: Floating-point operations of its backward, without recomputation.
        parameter_bytes: Bytes of its own parameters, as they are stored.
        activation_bytes: Bytes saved from forward to backward.

    Raises:
        PlanError: A number is negative, not finite, or no number; the error names the field and the sublayer.
    """

    name: str
    forward_flops: float
    backward_flops: float
    parameter_bytes: int
    activation_bytes: int

    def __post_init__(self) -> None:
        of = f" of {checked_text('SublayerCost.name', self.name)!r}"
        checked_fields(
            self,
            of,
            forward_flops="amount",
            backward_flops="amount",
            parameter_bytes="count",
            activation_bytes="count",
        )


@dataclass(frozen=True)
class StreamCost:
    """One stream's run of the chain.

    Args:
        name: The stream's name.
        first: Its first sublayer, counted in the chain.
        count: How many sublayers it has, at least 1.
        value_bytes: Bytes of one of its terms, per microbatch.

    Raises:
        PlanError: A number is negative or no whole number; the error names the field and the stream.
    """

    name: str
    first: int
    count: int
    value_bytes: int

    def __post_init__(self) -> None:
        of = f" of {checked_text('StreamCost.name', self.name)!r}"
        checked_fields(self, of, first="index", count="index", value_bytes="count")


@dataclass(frozen=True)
class CarriedValue:
    """A value other than a stream's sources that later sublayers use: an encoder's output, shared keys, a table.

    Args:
        name: Its name, unique among the values of a model.
        bytes: Its size, per microbatch.
        produced: The sublayer that makes it; -1 where it is made before the first.
        used: Later sublayers that take it, ascending; the number of sublayers stands for what follows the last.
        differentiable: Whether a gradient of the same size travels back.

    Raises:
        PlanError: A field has the wrong type, or the places do not ascend; the error names the field and the value.
    """

    name: str
    bytes: int
    produced: int
    used: tuple[int, ...]
    differentiable: bool = True

    def __post_init__(self) -> None:
        of = f" of {checked_text('CarriedValue.name', self.name)!r}"
        checked_fields(self, of, bytes="count", differentiable="flag")
        produced = checked_index(f"CarriedValue.produced{of}", self.produced, least=-1)
        used = tuple(
            checked_index(f"CarriedValue.used{of}", place)
            for place in checked_items(f"CarriedValue.used{of}", self.used)
        )
        object.__setattr__(self, "produced", produced)
        object.__setattr__(self, "used", used)
        places = (produced, *used)
        if list(places) != sorted(set(places)):
            raise PlanError(
                f"CarriedValue.used{of} is {used}: the places must ascend and come after sublayer {produced}, which "
                f"makes the value (CarriedValue.produced)."
            )


@dataclass(frozen=True)
class ModelCosts:
    """Everything a plan is made from, per microbatch.

    Args:
        sublayers: The chain, in the order in which it runs.
        before: What precedes the first sublayer (embedding).
        after: What follows the last (final norm, head).
        streams: In the order of the chain, which they fill.
        carried: What travels besides the sources of the streams.
        tied: Groups of places that hold one and the same parameter, each as `(bytes, places)`; a place is "before",
            "after" or the index of a sublayer as text. `parameter_bytes` counts it at the first place of a group only.

    Raises:
        PlanError: A field has the wrong type, streams leave a gap, or a place does not exist; the error names it.
    """

    sublayers: tuple[SublayerCost, ...]
    before: SublayerCost
    after: SublayerCost
    streams: tuple[StreamCost, ...]
    carried: tuple[CarriedValue, ...] = ()
    tied: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        checked_record("ModelCosts.before", self.before, SublayerCost)
        checked_record("ModelCosts.after", self.after, SublayerCost)
        for field, kind in (("sublayers", SublayerCost), ("streams", StreamCost), ("carried", CarriedValue)):
            name = f"ModelCosts.{field}"
            items = checked_items(name, getattr(self, field))
            object.__setattr__(
                self, field, tuple(checked_record(f"{name}[{i}]", item, kind) for i, item in enumerate(items))
            )
        self._check_streams()
        last = len(self.sublayers)
        for value in self.carried:
            if max((value.produced, *value.used)) > last or value.produced >= last:
                raise PlanError(
                    f"CarriedValue.used of {value.name!r} goes from sublayer {value.produced} to {value.used}: its "
                    f"places must not come after the last one ({last})."
                )
        tied = checked_items("ModelCosts.tied", self.tied)
        object.__setattr__(self, "tied", tuple(self._checked_tie(i, group) for i, group in enumerate(tied)))

    def _check_streams(self) -> None:
        at = 0
        for stream in self.streams:
            if stream.first != at or stream.count < 1:
                raise PlanError(
                    f"StreamCost.first and StreamCost.count of {stream.name!r} cover sublayers {stream.first} to "
                    f"{stream.first + stream.count - 1} of the chain, but the next free one is {at}: streams must "
                    f"follow each other without gaps."
                )
            at += stream.count
        if at != len(self.sublayers):
            raise PlanError(
                f"the streams have {at} sublayers (StreamCost.count) and ModelCosts.sublayers has "
                f"{len(self.sublayers)}: give one each."
            )
        for field in ("streams", "carried"):
            seen: set[str] = set()
            for item in getattr(self, field):
                if item.name in seen:
                    raise PlanError(f"ModelCosts.{field} has {item.name!r} twice: names must be unique.")
                seen.add(item.name)

    def _checked_tie(self, i: int, group: object) -> tuple[int, tuple[str, ...]]:
        name = f"ModelCosts.tied[{i}]"
        pair = checked_items(name, group)
        if len(pair) != 2:
            raise PlanError(f"{name} is {pair!r:.80}; it must be bytes and a tuple of places.")
        size = checked_count(f"{name}[0]", pair[0])
        places = tuple(checked_text(f"{name}[1]", place) for place in checked_items(f"{name}[1]", pair[1]))
        known = {"before", "after", *map(str, range(len(self.sublayers)))}
        if not known.issuperset(places) or len(set(places)) < 2:
            raise PlanError(
                f"{name} ties {', '.join(places) or 'nothing'}: it needs two places or more, each 'before', 'after' or "
                f"the index of a sublayer (0 to {len(self.sublayers) - 1}) as text."
            )
        return size, places


@dataclass(frozen=True)
class DeviceSpeed:
    """What turns counts into seconds, per rank.

    Args:
        flops: Floating-point operations a second that sublayers reach.
        memory_bandwidth: Bytes a second of the device's memory.
        link_bandwidth: Bytes a second between neighbouring ranks, in each direction.
        link_latency: Seconds that a message takes besides.

    Raises:
        PlanError: A speed is not positive and finite (the latency may be 0); the error names the field.
    """

    flops: float = 400e12
    memory_bandwidth: float = 3.0e12
    link_bandwidth: float = 50e9
    link_latency: float = 10e-6

    def __post_init__(self) -> None:
        checked_fields(
            self,
            "",
            flops="positive",
            memory_bandwidth="positive",
            link_bandwidth="positive",
            link_latency="amount",
        )

    def __str__(self) -> str:
        speeds = (
            (self.flops, "FLOP/s"),
            (self.memory_bandwidth, "B/s of memory"),
            (self.link_bandwidth, "B/s of links"),
        )
        counted = ", ".join(f"{_scaled(value)}{unit}" for value, unit in speeds)
        return f"{counted}, {self.link_latency * 1e6:.4g} us a message"


def _scaled(value: float) -> str:
    for letter, one in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= one:
            return f"{value / one:.4g} {letter}"
    return f"{value:.4g} "
