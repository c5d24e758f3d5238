"""PyTorch's pipeline schedules that can be planned for and run, and what numbers each of them takes."""

from enum import StrEnum

from attnres_fx.errors import PlanError

#: Forwards of all stages in one step, so that its order can be listed and simulated.
MOST_FORWARDS = 10**6


class PipelineSchedule(StrEnum):
    """A schedule of `torch.distributed.pipelining`; each equals the name that PyTorch gives it, as a string."""

    GPIPE = "GPipe"
    ONE_FORWARD_ONE_BACKWARD = "1F1B"
    INTERLEAVED = "Interleaved1F1B"
    ZERO_BUBBLE = "InterleavedZeroBubble"

    @property
    def single_stage(self) -> bool:
        """Whether it runs exactly one stage on each rank."""
        return self in (PipelineSchedule.GPIPE, PipelineSchedule.ONE_FORWARD_ONE_BACKWARD)

    @property
    def splits_backward(self) -> bool:
        """Whether a backward comes in two parts, of the inputs and of the weights."""
        return self is PipelineSchedule.ZERO_BUBBLE

    def __repr__(self) -> str:
        """As a user writes it."""
        return repr(self.value)


def as_pipeline_schedule(name: object) -> PipelineSchedule:
    """The schedule of this name. Raises PlanError where there is none."""
    try:
        return PipelineSchedule(name)  # type: ignore[arg-type]
    except ValueError:
        raise PlanError(f"schedule={name!r:.80} is none of {', '.join(PipelineSchedule)}.") from None


def check_schedule(schedule: str, *, num_stages: int, virtual_stages: int, num_microbatches: int) -> PipelineSchedule:
    """The schedule of this name, where it can run these numbers.

    Raises PlanError where it does not exist, or cannot run them.
    """
    known = as_pipeline_schedule(schedule)
    for name, number in (
        ("num_stages", num_stages),
        ("virtual_stages", virtual_stages),
        ("num_microbatches", num_microbatches),
    ):
        if number < 1:
            raise PlanError(f"{name} must be at least 1; it is {number}.")
    if known.single_stage and virtual_stages > 1:
        raise PlanError(
            f"the schedule {known} runs one stage on each rank, not virtual_stages={virtual_stages}: "
            f"choose virtual_stages=1 or schedule='Interleaved1F1B'."
        )
    if known is PipelineSchedule.ONE_FORWARD_ONE_BACKWARD and num_microbatches < num_stages:
        raise PlanError(
            f"the schedule 1F1B needs as many microbatches as stages: num_microbatches={num_microbatches} is less "
            f"than num_stages={num_stages}; raise num_microbatches or choose schedule='GPipe'."
        )
    stages = num_stages * virtual_stages
    if stages * num_microbatches > MOST_FORWARDS:
        most = MOST_FORWARDS // stages
        change = f"num_microbatches of at most {most}" if most else "fewer stages"
        raise PlanError(
            f"num_microbatches={num_microbatches} on num_stages={num_stages} times virtual_stages={virtual_stages} "
            f"stages are more forwards than can be listed ({MOST_FORWARDS}): choose {change}."
        )
    rounds = max(1, num_microbatches // num_stages)
    if not known.single_stage and num_microbatches % rounds:
        low = num_microbatches - num_microbatches % rounds
        raise PlanError(
            f"the schedule {known} runs num_microbatches={num_microbatches} on {num_stages} ranks in {rounds} "
            f"rounds and needs a multiple of that: choose num_microbatches={low} or {low + rounds}."
        )
    return known
