"""What the simulator takes of every virtual stage: the stage costs in seconds, a backward in its two parts."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.model_costs import DeviceSpeed, ModelCosts
from attnres_fx.partition.costs.stage_costs import stage_costs
from attnres_fx.partition.costs.unit_costs import PICOSECONDS, unit_costs

#: Share of a backward's operations that are for weights: one of the two products that belong to each of the forward.
WEIGHT_SHARE = 0.5


@dataclass(frozen=True)
class StageLoad:
    """What one virtual stage costs, per microbatch: seconds and bytes.

    Of the values that are kept for a rank's stages, each counts in one stage of the rank: where it is received, or
    where it is produced.

    Args:
        forward: Seconds.
        backward_input: Seconds of the part of the backward that the stage before waits for.
        backward_weight: Seconds of the rest; a backward in one part takes the sum of the two.
        send_forward: Seconds of the hop of its output to the next stage.
        send_backward: Seconds of the hop of its input's gradient to the stage before.
        activation_bytes: Kept from forward to backward.
        received_bytes: Of kept values that arrive here.
        produced_bytes: Of kept values that are made here.
        recomputed_bytes: Activations that exist besides while the backward runs a sublayer again.
    """

    forward: float
    backward_input: float
    backward_weight: float = 0.0
    send_forward: float = 0.0
    send_backward: float = 0.0
    activation_bytes: int = 0
    received_bytes: int = 0
    produced_bytes: int = 0
    recomputed_bytes: int = 0


def stage_loads(
    costs: ModelCosts,
    starts: Sequence[int],
    block_layouts: BlockLayouts | None,
    *,
    num_stages: int,
    device: DeviceSpeed | None = None,
    cache: bool = True,
    recompute: bool = False,
    weight_share: float = WEIGHT_SHARE,
) -> tuple[StageLoad, ...]:
    """One load per virtual stage, for `simulate`.

    Args:
        costs: Of the model, per microbatch.
        starts: First sublayer of each stage.
        block_layouts: By stream name; None for the plain residual, which reads nothing.
        num_stages: Ranks P; stage c runs on rank c mod P.
        device: Speeds of every rank.
        cache: Whether ranks keep values and hops carry the exact count; else the naive one.
        recompute: Whether sublayers keep their input alone and run forward once more in backward.
        weight_share: Of a backward's operations, where it is in two parts; a read's own backward and the recomputation
            are all in the first part.

    Raises:
        PlanError: A stage would be empty.
    """
    device = device or DeviceSpeed()
    units = unit_costs(costs, block_layouts, device=device, recompute=recompute)
    stages = stage_costs(costs, units, starts, num_stages=num_stages, device=device, cache=cache)
    weights = [weight_share * own / PICOSECONDS for own in stages.sublayer_backward]
    return tuple(
        StageLoad(
            forward=stages.forward[c] / PICOSECONDS,
            backward_input=stages.backward[c] / PICOSECONDS - weights[c],
            backward_weight=weights[c],
            send_forward=stages.hop_forward[c] / PICOSECONDS,
            send_backward=stages.hop_backward[c - 1] / PICOSECONDS if c else 0.0,
            activation_bytes=stages.saved_bytes[c],
            received_bytes=stages.received_bytes[c],
            produced_bytes=stages.sent_bytes[c],
            recomputed_bytes=stages.recomputed_bytes[c],
        )
        for c in range(len(starts))
    )
