"""What the planner, the traffic model and the timeline know of a model: plain numbers, no graph and no torch.

The sublayers of all streams that are not nested in another's sublayer stand in one chain, in the order in which they
run. Virtual stages are runs of that chain; what precedes the first sublayer (embedding) goes to the first of them,
what follows the last (final norm, head) to the last.
"""

from dataclasses import dataclass

from attnres_fx.errors import PlanError


@dataclass(frozen=True)
class SublayerCost:
    """One sublayer, or what stands before the first or after the last; per microbatch, without its depth read.

    name: module path of the read that opens it. forward_flops, backward_flops: floating-point operations.
    parameter_bytes: of its own parameters, as stored. activation_bytes: saved from forward to backward.
    """

    name: str
    forward_flops: float
    backward_flops: float
    parameter_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class StreamCost:
    """One stream's run of the chain. first, count: its sublayers; value_bytes: one term of it, per microbatch."""

    name: str
    first: int
    count: int
    value_bytes: int


@dataclass(frozen=True)
class CarriedValue:
    """A value other than a stream's sources that later sublayers use: an encoder's output, shared keys, a table.

    bytes: per microbatch. produced: the sublayer that makes it, -1 before the first; used: later sublayers that take
    it, ascending, their number for what follows the last.
    differentiable: whether a gradient of the same size travels back.
    """

    name: str
    bytes: int
    produced: int
    used: tuple[int, ...]
    differentiable: bool = True


@dataclass(frozen=True)
class ModelCosts:
    """Everything a plan is made from.

    sublayers: the chain. before, after: embedding and head. streams: in the order of the chain, which they fill.
    tied: groups of places ("before", "after" or sublayer indices as text) that hold one and the same parameter, each
    with its bytes; `parameter_bytes` counts it at the first place of the group only.
    """

    sublayers: tuple[SublayerCost, ...]
    before: SublayerCost
    after: SublayerCost
    streams: tuple[StreamCost, ...]
    carried: tuple[CarriedValue, ...] = ()
    tied: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        at = 0
        for stream in self.streams:
            if stream.first != at or stream.count < 1:
                raise PlanError(
                    f"the stream {stream.name!r} covers sublayers {stream.first} to {stream.first + stream.count - 1} "
                    f"of the chain, but the next free one is {at}: streams must follow each other without gaps."
                )
            at += stream.count
        if at != len(self.sublayers):
            raise PlanError(
                f"the streams have {at} sublayers and {len(self.sublayers)} costs are given: give one each."
            )


@dataclass(frozen=True)
class DeviceSpeed:
    """What turns counts into seconds, per rank.

    flops: floating-point operations a second that sublayers reach. memory_bandwidth, link_bandwidth: bytes a second.
    link_latency: seconds a message.
    """

    flops: float = 400e12
    memory_bandwidth: float = 3.0e12
    link_bandwidth: float = 50e9
    link_latency: float = 10e-6
