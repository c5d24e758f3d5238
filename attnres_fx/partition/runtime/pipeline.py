"""This rank's part of a pipeline: steps, evaluation, parameters, checkpoints."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnres_fx.errors import PipelineError
from attnres_fx.parameters import STATE_KEY
from attnres_fx.partition import checkpoint
from attnres_fx.partition.pipeline_schedule import PipelineSchedule
from attnres_fx.partition.plan.plan import Plan
from attnres_fx.partition.runtime.checkpointed import Checkpointed
from attnres_fx.partition.runtime.gradients import TiedGradients, scale_gradients, total_norm
from attnres_fx.partition.runtime.step_log import HopBytes
from attnres_fx.partition.runtime.step_runner import StepRunner
from attnres_fx.partition.split.stage import Stage

if TYPE_CHECKING:
    from attnres_fx.partition.runtime.source_stage import SourceStage


@dataclass(frozen=True)
class Evaluation:
    """Result of `Pipeline.evaluate`.

    Attributes:
        loss: The mean loss, a float32 scalar, on every rank; None where no target was given.
        outputs: The model's output for the whole batch, on the last rank; None on the others.
    """

    loss: Tensor | None
    outputs: Any


class Pipeline(Checkpointed):
    """This rank's part of a pipeline, from `build_pipeline`. Every rank calls every method, in the same order.

    Attributes:
        plan: The plan it was built from.
        modules: This rank's stages by index, with their parameters.
        stages: The same as PyTorch's schedules drive them.
        runner: Runs one batch.
        schedule: PyTorch's schedule over these stages.
    """

    def __init__(self, plan: Plan, schedule: PipelineSchedule, runner: StepRunner, tied: TiedGradients) -> None:
        """Used by `build_pipeline`, which is what to call.

        Args:
            plan: The plan that the stages were built from.
            schedule: The plan's schedule.
            runner: Runs one batch through this rank's stages.
            tied: Keeps tied parameters equal.
        """
        from attnres_fx.partition.runtime.torch_schedule import build_schedule

        self.plan, self.runner = plan, runner
        super().__init__()
        self._tied = tied
        number = runner.num_microbatches
        self.schedule = build_schedule(schedule, runner.stages, number, runner.loss_of)
        self._forward_schedule = build_schedule(schedule, runner.stages, number, None)

    @property
    def modules(self) -> dict[int, Stage]:
        """This rank's stages by index, ascending."""
        return self.runner.modules

    @property
    def stages(self) -> tuple["SourceStage", ...]:
        """This rank's stages as PyTorch's schedules drive them, ascending."""
        return self.runner.stages

    # Running

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch; gradients are added to those already there.

        All ranks of a pipeline pass the same whole batch; it is split along dimension 0.

        Args:
            *args: The model's positional arguments.
            target: What `loss_fn` takes beside the model's output.
            **kwargs: The model's keyword arguments.

        Returns:
            The mean loss, a float32 scalar, equal on every rank: over all elements of the target that are not
            ignored, of all microbatches and of all data-parallel batches.

        Raises:
            PipelineError: On every rank where a stage failed on one of them (the gradients are then incomplete:
                call `zero_grad()` before the next step, which will be clean), and where a neighbour was lost (then
                the job has to start again from a checkpoint, as after any failure under data parallelism).
        """
        if not torch.is_grad_enabled():
            raise PipelineError("step() computes gradients and was called under no_grad(): call evaluate() there.")
        runner, done = self.runner, False
        runner.start(args, kwargs, target, training=self.training)
        self._tied.start()
        try:
            with runner.communication():
                runner.run(self.schedule)
                loss, failures = runner.agree()
            runner.raise_failure(failures)
            done = True
        finally:
            runner.clear()
            if not done:
                self._tied.finish(add=False)
        with runner.communication():
            self._tied.finish(add=True)
        return loss

    def evaluate(self, *args: Any, target: Any = None, **kwargs: Any) -> Evaluation:
        """Forward of one batch in eval mode, without gradients; the mode from before is restored afterwards.

        Args:
            *args: The model's positional arguments for the whole batch.
            target: What `loss_fn` takes beside the model's output; without it no loss is computed.
            **kwargs: The model's keyword arguments.

        Returns:
            Loss and outputs.

        Raises:
            PipelineError: As `step` does.
        """
        training, runner = self.training, self.runner
        self.train(False)
        try:
            batches = runner.start(args, kwargs, target, training=False)
            with torch.no_grad(), runner.communication():
                runner.run(self._forward_schedule)
                outputs = runner.joined_outputs(batches)
                loss, failures = runner.agree()
            runner.raise_failure(failures)
        finally:
            runner.clear()
            self.train(training)
        return Evaluation(loss if target is not None else None, outputs)

    # The last step

    @property
    def actions(self) -> tuple[str, ...]:
        """Actions of this rank in the last `step` or `evaluate`, in order, as the schedules write them: `"0F1"`."""
        return tuple(self.runner.log.actions)

    @property
    def bytes_sent(self) -> dict[int, HopBytes]:
        """Bytes this rank sent in the last `step` or `evaluate`, by hop (named by the stage on its earlier side)."""
        return dict(self.runner.log.sent)

    @property
    def peak_cache_bytes(self) -> int:
        """Largest number of bytes of values in this rank's caches at one time."""
        return sum(c.peak_bytes for c in {id(s.cache): s.cache for s in self.stages}.values())

    @property
    def num_retained(self) -> int:
        """Tensors and autograd graphs of microbatches that are still referenced; 0 between steps."""
        return sum(stage.num_retained for stage in self.stages)

    # Parameters

    @property
    def training(self) -> bool:
        """Whether the stages are in train mode."""
        return next(iter(self.modules.values())).training

    def train(self, mode: bool = True) -> "Pipeline":
        """Set train or eval mode of every stage, and so which of its graphs runs.

        Args:
            mode: True for train mode, False for eval mode.

        Returns:
            The pipeline itself.
        """
        self.runner.model_stages.train(mode)
        for stage in self.stages:
            stage.submod.train(mode)
        return self

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under their names in the model, each once.

        Yields:
            Name and parameter, stage by stage.
        """
        seen: set[int] = set()
        for module in self.modules.values():
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer.

        Returns:
            An iterator over them, each once.
        """
        return (parameter for _, parameter in self.named_parameters())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of this rank's parameters.

        Args:
            set_to_none: Whether gradients become None; otherwise they are filled with zeros.
        """
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients of all ranks down, in place, to a norm of at most `max_norm`.

        The norm is the whole model's: tied parameters count once, shards of all data-parallel ranks together.

        Args:
            max_norm: Largest norm.
            norm_type: The p of the norm, or infinity.

        Returns:
            The norm before, a float32 scalar, equal on every rank.
        """
        copies = {id(p) for group in self._tied.groups for p in group.copies}
        groups = self.runner.groups
        with self.runner.communication():
            norm = total_norm(
                [p for p in self.parameters() if id(p) not in copies],
                norm_type=norm_type,
                pipeline=groups.pipeline,
                replicas=groups.replicas,
                device=self.runner.device,
            )
        scale_gradients(list(self.parameters()), (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.float()

    # Checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's parameters and buffers under their names in the model.

        Returns:
            The tensors by name; they share memory with the stages.
        """
        return checkpoint.merged_state(list(self.modules.values()))

    def _checkpoint_parts(self) -> checkpoint.Parts:
        stages = self.runner.model_stages
        return checkpoint.Parts(
            modules=tuple(self.modules.values()),
            aliases=tuple(tuple(name for _, name in group) for group in stages.tied),
            made_for={STATE_KEY: stages.made_for},
        )
