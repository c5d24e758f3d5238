"""PyTorch's pipeline schedules that can be planned for, and what numbers each of them takes."""

from typing import Literal, get_args

from attnres_fx.errors import PlanError

ScheduleName = Literal["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
#: These take one stage a rank.
SINGLE = ("GPipe", "1F1B")
ZERO_BUBBLE = ("InterleavedZeroBubble",)


def check_schedule(schedule: str, *, num_stages: int, virtual_stages: int, num_microbatches: int) -> None:
    """Raises PlanError where the schedule does not exist, or cannot run these numbers."""
    if schedule not in SCHEDULES:
        raise PlanError(f"schedule={schedule!r} is none of {', '.join(SCHEDULES)}.")
    for name, number in (
        ("num_stages", num_stages),
        ("virtual_stages", virtual_stages),
        ("num_microbatches", num_microbatches),
    ):
        if number < 1:
            raise PlanError(f"{name} must be at least 1; it is {number}.")
    if schedule in SINGLE and virtual_stages > 1:
        raise PlanError(
            f"the schedule {schedule} runs one stage on each rank, not virtual_stages={virtual_stages}: "
            f"choose virtual_stages=1 or schedule='Interleaved1F1B'."
        )
    if schedule == "1F1B" and num_microbatches < num_stages:
        raise PlanError(
            f"the schedule 1F1B needs as many microbatches as stages: num_microbatches={num_microbatches} is less "
            f"than num_stages={num_stages}; raise num_microbatches or choose schedule='GPipe'."
        )
    rounds = max(1, num_microbatches // num_stages)
    if schedule not in SINGLE and num_microbatches % rounds:
        low = num_microbatches - num_microbatches % rounds
        raise PlanError(
            f"the schedule {schedule} runs num_microbatches={num_microbatches} on {num_stages} ranks in {rounds} "
            f"rounds and needs a multiple of that: choose num_microbatches={low} or {low + rounds}."
        )
