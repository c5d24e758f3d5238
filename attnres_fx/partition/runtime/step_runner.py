"""Runs one batch through this rank's stages, and agrees with the other ranks on how it went."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_fx.errors import PipelineError
from attnres_fx.partition.runtime.agreement import facts_of_ranks, require_same
from attnres_fx.partition.runtime.microbatches import MeanLoss, Microbatches, join_outputs, split_batch
from attnres_fx.partition.runtime.process_groups import ProcessGroups
from attnres_fx.partition.runtime.stage_spec import Shapes, StageSpec, shape_of
from attnres_fx.partition.split.stage import Stage
from attnres_fx.partition.split.stages import Stages

if TYPE_CHECKING:
    from attnres_fx.partition.runtime.source_stage import SourceStage


class StepRunner:
    """One batch at a time through this rank's stages: `start`, `run`, `finish`, and `clear` in any case.

    What is wrong with a batch raises before anything is sent. A stage that fails is reported on every rank; a rank
    that is lost breaks the pipeline for good.
    """

    def __init__(
        self,
        model_stages: Stages,
        modules: Mapping[int, Stage],
        stages: Sequence["SourceStage"],
        loss: MeanLoss,
        groups: ProcessGroups,
        *,
        num_microbatches: int,
        ignore_index: int,
        device: torch.device,
    ) -> None:
        """A runner.

        Args:
            model_stages: The stages of the model, at least this rank's.
            modules: This rank's, by index.
            stages: The same for PyTorch's schedules.
            loss: Of a microbatch.
            groups: The ranks of the pipeline, and the replicas.
            num_microbatches: Of a step.
            ignore_index: Elements of an integer target that do not count.
            device: Where the stages run.
        """
        self.model_stages, self.modules, self.stages = model_stages, dict(modules), tuple(stages)
        self.loss, self.groups, self.device = loss, groups, device
        self.num_microbatches, self.ignore_index = num_microbatches, ignore_index
        self.log = stages[0].log
        self.shapes: dict[Any, Shapes] = {}
        self._broken: str | None = None
        self._compared = False

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, *, training: bool) -> Microbatches:
        """Split a batch and set the stages up for it.

        Raises:
            PipelineError: The batch does not divide into microbatches, or the pipeline is broken.
        """
        if self._broken is not None:
            raise PipelineError(f"this pipeline cannot go on: {self._broken}")
        batches = split_batch(
            args,
            kwargs,
            target,
            self.num_microbatches,
            ignore_index=self.ignore_index,
            device=self.device,
            shared=self.model_stages.shared(args, kwargs),
        )
        flat = [tuple(self.model_stages.flatten(a, k)) for a, k in batches.arguments]
        if not self._compared:
            self._compare(flat[0], training)
        self.clear()
        self.log.actions.clear()
        self.log.sent.clear()
        self._set_specs(flat, training)
        if self.stages[-1].is_last:
            total = batches.counts.sum()
            if self.groups.replicas is not None:
                with self.communication():
                    dist.all_reduce(total, group=self.groups.replicas)
            self.loss.start(batches, total)
        return batches

    def _compare(self, flat: Sequence[Any], training: bool) -> None:
        """Compare the first call with those of the other ranks."""
        shapes = [shape_of(x) if isinstance(x, Tensor) else repr(x) for x in flat]
        facts = {"mode": "train" if training else "eval", "arguments of a microbatch": str(shapes)}
        with self.communication():  # what differs is no lost neighbour
            gathered = facts_of_ranks(facts, self.groups.pipeline)
        require_same(gathered, "Every rank calls the same method with the same whole batch.")
        self._compared = True

    def _set_specs(self, flat: Sequence[Sequence[Any]], training: bool) -> None:
        """Routes and shapes of the current mode; one cache for all stages of the rank if they share."""
        key = (training, *(shape_of(x) if isinstance(x, Tensor) else repr(x) for x in flat[0]))
        if key not in self.shapes:
            self.shapes[key] = self.model_stages.shapes(flat[0])
        differentiable = frozenset(v.name for v in self.model_stages.values if v.differentiable)
        routes = {c: module.route for c, module in self.modules.items()}
        shares = any(route.cached for route in routes.values())
        for stage in self.stages:
            stage.flat_inputs = flat
            stage.spec = StageSpec(
                routes[stage.stage_index],
                inputs=self.modules[stage.stage_index].inputs,
                differentiable=differentiable,
                shapes=self.shapes[key],
                cache=self.stages[0].own_cache if shares else stage.own_cache,
                last_user=not shares or stage is self.stages[-1],
            )

    def run(self, schedule: Any) -> None:
        """All actions of one of PyTorch's schedules; the loss is called with an output and its microbatch's number."""
        schedule.step(target=torch.arange(self.num_microbatches), return_outputs=False)

    def loss_of(self, outputs: Any, index: Tensor) -> Tensor:
        """The loss as a schedule calls it. index: number of the microbatch, an integer scalar."""
        loss = self.log.attempt(f"the loss of microbatch {int(index)}", lambda: self.loss(outputs, int(index)))
        return torch.zeros((), device=self.device) if loss is None else loss

    def joined_outputs(self, batches: Microbatches) -> Any:
        """The model's output for the whole batch, after a forward pass; None on all ranks but the last."""
        last = self.stages[-1]
        if not last.is_last:
            return None
        return self.log.attempt("joining the outputs", lambda: self._join(last.outputs, batches))

    def _join(self, outputs: Mapping[int, tuple[Any, ...]], batches: Microbatches) -> Any:
        ordered = [outputs[index] for index in range(len(batches))]
        if batches.targets is not None:
            for index, microbatch in enumerate(ordered):
                self.loss(microbatch, index)
        return self.model_stages.unflatten(join_outputs(ordered))

    def agree(self) -> tuple[Tensor, str]:
        """The mean loss, a float32 scalar, and what failed on any rank, or "": the same on every rank."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.loss.value is not None:
            sums[0] = self.loss.value
        sums[1] = self.log.failure is not None
        for group in (self.groups.pipeline, self.groups.replicas):
            if group is not None:
                dist.all_reduce(sums, group=group)
        if not sums[1]:
            return sums[0].float(), ""
        texts: list[str | None] = [None] * dist.get_world_size(self.groups.pipeline)
        dist.all_gather_object(texts, self.log.failure_text, group=self.groups.pipeline)
        failures = [f"rank {rank} in {text}" for rank, text in enumerate(texts) if text]
        return sums[0].float(), "; ".join(failures) or "a rank of another replica"

    def raise_failure(self, failures: str) -> None:
        """Raises, on every rank alike, what stages met on any of them.

        Raises:
            PipelineError: `failures` is not empty.
        """
        if not failures:
            return
        text = (
            f"a stage failed, and the step was not done: {failures}. Actions are named <virtual stage><F, B, I or W>"
            f"<microbatch>."
        )
        if self.groups.replicas is not None:
            self._broken = (
                f"{text} What data parallelism had under way is undefined now: restart from the last checkpoint."
            )
        advice = "Call zero_grad() before the next step."
        raise PipelineError(self._broken or f"{text} {advice}") from (self.log.failure and self.log.failure[1])

    @contextlib.contextmanager
    def communication(self) -> Iterator[None]:
        """Around whatever talks to other ranks: if that breaks, says where this rank stood, and runs no more steps."""
        try:
            yield
        except BaseException as error:
            numbers = [stage.stage_index for stage in self.stages]
            self._broken = self.log.lost_neighbour(error, rank=self.groups.rank, stages=numbers)
            if not isinstance(error, Exception):  # the user's interrupt stays one
                raise
            raise PipelineError(self._broken) from error

    def clear(self) -> None:
        """Release everything of the last step but its log."""
        for stage in self.stages:
            stage.clear_runtime_states()
            stage.flat_inputs = ()
        self.loss.clear()
        self.log.waiting.clear()
        self.log.failure = None
