"""This rank's part of a pipeline: steps, evaluation, gradients, checkpoints."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_fx.errors import PipelineError
from attnres_fx.partition import checkpoint
from attnres_fx.partition.runtime.contract import Plan, Shapes, Stage, Stages, shape_of
from attnres_fx.partition.runtime.gradients import TiedGradients, scale_gradients, total_norm
from attnres_fx.partition.runtime.microbatches import MeanLoss, Microbatches, join_outputs, split_batch

if TYPE_CHECKING:
    from attnres_fx.partition.runtime.stage_hooks import SourceStage
    from attnres_fx.partition.runtime.step_log import HopBytes


@dataclass(frozen=True)
class Evaluation:
    """What `Pipeline.eval` found. loss: on every rank, where a target was given. outputs: on the last rank only."""

    loss: Tensor | None
    outputs: Any


class Pipeline:
    """This rank's part of a pipeline; made by `build_pipeline`. Every rank calls every method, in the same order."""

    def __init__(
        self,
        contract: Stages,
        modules: dict[int, nn.Module],
        stages: Sequence["SourceStage"],
        plan: Plan,
        loss: MeanLoss,
        tied: TiedGradients,
        *,
        ignore_index: int,
        device: torch.device,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        from attnres_fx.partition.runtime.stage_hooks import build_schedule

        self.plan, self.stages, self.device = plan, tuple(stages), device
        self.modules = modules
        self._contract, self._loss, self._tied = contract, loss, tied
        self._ignore_index, self._group, self._replicas = ignore_index, group, replicas
        self._log = stages[0].log
        self._broken: str | None = None
        self._shapes: dict[Any, Shapes] = {}
        number = plan.num_microbatches
        self.schedule = build_schedule(plan.schedule, stages, number, self._loss_of)
        self._forward_only = build_schedule(plan.schedule, stages, number, None)

    # Running

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch; gradients are added to those already there.

        All ranks of a pipeline give the same whole batch; it is split along dimension 0. Returns the mean loss, a
        float32 scalar, equal on every rank: over all elements of the target that are not ignored, of all
        microbatches and of all data-parallel batches. Raises PipelineError on every rank where a stage failed on
        one of them (the gradients are then incomplete: `zero_grad()` before the next step, which will be clean),
        and where a neighbour was lost (then the job has to start again from a checkpoint, as it has to after any
        failure under data parallelism).
        """
        if not torch.is_grad_enabled():
            raise PipelineError("step() computes gradients and was called under no_grad(): call eval() there.")
        self._start(args, kwargs, target)
        self._tied.start()
        done = False
        try:
            with self._lost_neighbours():
                self._run(self.schedule)
                loss, failed = self._agree()
            self._raise_failure(failed)
            done = True
        finally:
            self._clear()
            if not done:
                self._tied.finish(add=False)
        with self._lost_neighbours():
            self._tied.finish(add=True)
        return loss

    def eval(self, *args: Any, target: Any = None, **kwargs: Any) -> Evaluation:
        """Forward of one batch in eval mode, without gradients; train mode is put back after."""
        training = self.training
        self.train(False)
        try:
            batches = self._start(args, kwargs, target)
            last, outputs = self.stages[-1], None
            with torch.no_grad(), self._lost_neighbours():
                self._run(self._forward_only)
                if last.is_last:
                    outputs = self._log.attempt("joining the outputs", lambda: self._join(last.outputs, batches))
                loss, failed = self._agree()
            self._raise_failure(failed)
        finally:
            self._clear()
            self.train(training)
        return Evaluation(loss if target is not None else None, outputs)

    def _join(self, outputs: dict[int, tuple[Any, ...]], batches: Microbatches) -> Any:
        found = [outputs[index] for index in range(len(batches))]
        if batches.targets is not None:
            for index, microbatch in enumerate(found):
                self._loss(microbatch, index)
        return self._contract.unflatten(join_outputs(found))

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Microbatches:
        """The batch in parts, handed to the stages. Whatever is wrong with it is said before anything is sent."""
        if self._broken is not None:
            raise PipelineError(f"this pipeline cannot go on: {self._broken}")
        batches = split_batch(
            args, kwargs, target, self.plan.num_microbatches, ignore_index=self._ignore_index, device=self.device
        )
        flat = [tuple(self._contract.flatten(a, k)) for a, k in batches.arguments]
        self._clear()
        self._log.actions.clear()
        self._log.sent.clear()
        self._set_terms(flat)
        if self.stages[-1].is_last:
            total = batches.counts.sum()
            if self._replicas is not None:
                with self._lost_neighbours():
                    dist.all_reduce(total, group=self._replicas)
            self._loss.start(batches, total)
        return batches

    def _set_terms(self, flat: Sequence[Sequence[Any]]) -> None:
        """Routes and shapes of the current mode, handed to the stages; one cache for all of them if they share."""
        from attnres_fx.partition.runtime.stage_hooks import Terms

        key = (self.training, *(shape_of(x) if isinstance(x, Tensor) else repr(x) for x in flat[0]))
        if key not in self._shapes:
            self._shapes[key] = self._contract.shapes(flat[0])
        differentiable = frozenset(v.name for v in self._contract.values if v.differentiable)
        routes = {c: cast(Stage, module).route for c, module in self.modules.items()}
        shares = any(route.cached for route in routes.values())
        for stage in self.stages:
            c = stage.stage_index
            stage.flat_inputs = flat
            stage.terms = Terms(
                routes[c],
                inputs=cast(Stage, self.modules[c]).inputs,
                differentiable=differentiable,
                shapes=self._shapes[key],
                cache=self.stages[0].own_cache if shares else stage.own_cache,
                frees=not shares or stage is self.stages[-1],
            )

    def _run(self, schedule: Any) -> None:
        from attnres_fx.partition.runtime.stage_hooks import run_schedule

        run_schedule(schedule, self.plan.num_microbatches)

    def _loss_of(self, outputs: Any, index: Tensor) -> Tensor:
        last = f"the loss of microbatch {int(index)}"
        loss = self._log.attempt(last, lambda: self._loss(outputs, int(index)))
        return torch.zeros((), device=self.device) if loss is None else loss

    def _agree(self) -> tuple[Tensor, str]:
        """The mean loss, and what went wrong on any rank; the same on every rank."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self._loss.value is not None:
            sums[0] = self._loss.value
        sums[1] = self._log.failure is not None
        for group in (self._group, self._replicas):
            if group is not None:
                dist.all_reduce(sums, group=group)
        if not sums[1]:
            return sums[0].float(), ""
        told: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(told, self._log.told, group=self._group)
        failed = [f"rank {rank} in {text}" for rank, text in enumerate(told) if text]
        return sums[0].float(), "; ".join(failed) or "a rank of another replica"

    def _raise_failure(self, failed: str) -> None:
        """Raises, on every rank alike, what stages met on any of them."""
        if not failed:
            return
        said = (
            f"a stage failed, and the step was not done: {failed}. Actions are named <virtual stage><F, B, I or W>"
            f"<microbatch>."
        )
        if self._replicas is not None:
            self._broken = (
                f"{said} What data parallelism had under way is undefined now: restart from the last checkpoint."
            )
        advice = "Call zero_grad() before the next step."
        raise PipelineError(self._broken or f"{said} {advice}") from (self._log.failure and self._log.failure[1])

    @contextlib.contextmanager
    def _lost_neighbours(self) -> Iterator[None]:
        """Says where this rank stood when communication broke, after which there is no going on."""
        try:
            yield
        except BaseException as error:
            numbers = [stage.stage_index for stage in self.stages]
            self._broken = self._log.lost(error, rank=dist.get_rank(self._group), stages=numbers)
            if not isinstance(error, Exception):  # the user's interrupt stays one
                raise
            raise PipelineError(self._broken) from error

    def _clear(self) -> None:
        for stage in self.stages:
            stage.clear_runtime_states()
            stage.flat_inputs = ()
        self._loss.clear()
        self._log.waiting.clear()
        self._log.failure = None

    # What happened

    @property
    def actions(self) -> tuple[str, ...]:
        """What this rank did in the last step or eval, in order, in the schedules' spelling: `"0F1"`."""
        return tuple(self._log.actions)

    @property
    def bytes_sent(self) -> dict[int, "HopBytes"]:
        """Bytes this rank sent in the last step or eval, by hop (named by the stage on its earlier side)."""
        return dict(self._log.sent)

    @property
    def peak_cache_bytes(self) -> int:
        """Most bytes of values that this rank's caches have held at once."""
        return sum(c.peak_bytes for c in {id(s.cache): s.cache for s in self.stages}.values())

    @property
    def held(self) -> int:
        """Tensors and graphs of microbatches still held; 0 between steps."""
        return sum(stage.held for stage in self.stages)

    # Parameters

    @property
    def training(self) -> bool:
        """Whether the stages are in train mode."""
        return next(iter(self.modules.values())).training

    def train(self, mode: bool = True) -> "Pipeline":
        """Train or eval mode of every stage, and so which of its graphs runs."""
        self._contract.train(mode)
        for stage in self.stages:
            stage.submod.train(mode)
        return self

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under their original names, each once."""
        seen: set[int] = set()
        for module in self.modules.values():
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this rank's parameters."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients of all ranks down to a norm of at most `max_norm`; returns the norm before.

        The norm is the whole model's: tied parameters count once, shards of all data-parallel ranks together.
        """
        copies = {id(p) for g in self._tied.groups for p in (g.here[1:] if g.owns else g.here)}
        mine = [p for p in self.parameters() if id(p) not in copies]
        with self._lost_neighbours():
            norm = total_norm(
                mine, norm_type=norm_type, pipeline=self._group, shards=self._replicas, device=self.device
            )
        scale_gradients(list(self.parameters()), (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.float()

    # Checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's parameters and buffers under their original names."""
        return checkpoint.merged_state(list(self.modules.values()))

    def save(self, path: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write a checkpoint that any number of stages, or the unsplit model, can load (`load_checkpoint`)."""
        checkpoint.save_modules(path, self._checkpoint_parts(), optimizer)

    def load(self, path: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Read a checkpoint that was saved with any number of stages, or from the unsplit model."""
        checkpoint.load_modules(path, self._checkpoint_parts(), optimizer)

    def _checkpoint_parts(self) -> checkpoint.Parts:
        return checkpoint.Parts(
            modules=tuple(self.modules.values()),
            aliases=tuple(tuple(name for _, name in group) for group in self._contract.tied),
        )
