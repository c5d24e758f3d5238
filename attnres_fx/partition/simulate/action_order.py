"""The order in which every rank works, from PyTorch's own schedules: no process group, no stage, nothing runs."""

from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch

from attnres_fx.errors import PlanError
from attnres_fx.partition.pipeline_schedule import PipelineSchedule, check_schedule

#: By what PyTorch calls a computation.
_KINDS: dict[str, Literal["F", "B", "I", "W"]] = {
    "FORWARD": "F",
    "FULL_BACKWARD": "B",
    "BACKWARD_INPUT": "I",
    "BACKWARD_WEIGHT": "W",
}


class Action(NamedTuple):
    """One computation: `str` spells it as PyTorch does (`0F0`, `1B3`, `0I2`, `0W2`).

    kind: F forward, B backward, or backward in two parts: I of the inputs, W of the weights.
    """

    stage: int
    kind: Literal["F", "B", "I", "W"]
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def action_orders(
    schedule: str, *, num_stages: int, virtual_stages: int = 1, num_microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """Per rank the computations of one training step, in the order in which PyTorch's runtime executes them.

    Raises PlanError for numbers the schedule cannot run, and where this torch has no such schedules.
    """
    known = check_schedule(
        schedule, num_stages=num_stages, virtual_stages=virtual_stages, num_microbatches=num_microbatches
    )
    listed = _listed_orders(known, num_stages, virtual_stages, num_microbatches)
    orders = tuple(tuple(_actions(listed[rank])) for rank in range(num_stages))
    return tuple(_in_turn(order) for order in orders) if known.single_stage else orders


def _listed_orders(
    schedule: PipelineSchedule, num_stages: int, virtual_stages: int, num_microbatches: int
) -> dict[int, list[Any]]:
    try:
        from torch.distributed.pipelining.schedules import get_schedule_class
    except ImportError as error:
        raise PlanError(
            f"the timeline takes its orders from torch.distributed.pipelining, which torch {torch.__version__} "
            f"does not have here ({error}): it needs torch 2.11 or later, built with torch.distributed."
        ) from error
    # Schedules look at these of a stage while they write their order, and at no more.
    stage = SimpleNamespace(
        num_stages=num_stages * virtual_stages, group_rank=0, group_size=num_stages, stage_index=0, submod=None
    )
    stages = stage if schedule.single_stage else [stage] * virtual_stages
    try:
        found = get_schedule_class(schedule.value)(stages, num_microbatches).pipeline_order
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise PlanError(
            f"torch {torch.__version__} gives no order for schedule={schedule!r} with num_stages={num_stages}, "
            f"virtual_stages={virtual_stages}, num_microbatches={num_microbatches}: {error}. Change one of these; "
            f"the versions this is made for are torch 2.11 to 2.13."
        ) from error
    return dict(found)


def _actions(listed: list[Any]) -> list[Action]:
    """Without the gaps, and without what computes nothing."""
    computed = [action for action in listed if action is not None and action.computation_type.name in _KINDS]
    return [Action(a.stage_index, _KINDS[a.computation_type.name], a.microbatch_index) for a in computed]


def _in_turn(order: tuple[Action, ...]) -> tuple[Action, ...]:
    """Microbatches numbered as they come. The listing of 1F1B starts the last rank's forwards at 1; its loop, at 0."""
    seen = {"F": 0, "B": 0}
    renumbered = []
    for action in order:
        renumbered.append(action._replace(microbatch=seen[action.kind]))
        seen[action.kind] += 1
    return tuple(renumbered)
