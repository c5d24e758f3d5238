"""A schedule of `torch.distributed.pipelining` over this rank's stages."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.pipelining.schedules import _PipelineSchedule, get_schedule_class

from attnres_fx.errors import PipelineError
from attnres_fx.partition.pipeline_schedule import PipelineSchedule
from attnres_fx.partition.runtime.source_stage import SourceStage


def build_schedule(
    schedule: PipelineSchedule,
    stages: Sequence[SourceStage],
    num_microbatches: int,
    loss: Callable[[Any, Tensor], Tensor] | None,
) -> _PipelineSchedule:
    """PyTorch's schedule over this rank's stages.

    Args:
        schedule: Which one.
        stages: This rank's, ascending.
        num_microbatches: Of a step.
        loss: Called with a microbatch's output and its number as a tensor; without it, the schedule runs forward only.

    Raises:
        PipelineError: The schedule does not run so many microbatches on so many stages.
    """
    driven: Any = stages[0] if schedule.single_stage else list(stages)
    make: Any = get_schedule_class(str(schedule))
    try:
        built: _PipelineSchedule = make(driven, num_microbatches, loss_fn=loss, scale_grads=False)
        return built
    except (ValueError, AssertionError) as error:
        raise PipelineError(
            f"schedule {str(schedule)!r} does not run {num_microbatches} microbatches on {len(stages)} virtual stages "
            f"a rank: {error} Change num_microbatches or schedule in the plan."
        ) from error
