"""From a plan and a rank to a pipeline that trains: stages, sources, loss, tied parameters, data parallelism.

`torch.distributed.pipelining` runs the schedule; which values travel is the routes' business. Needs torch 2.13.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_fx.errors import PipelineError
from attnres_fx.partition import checkpoint
from attnres_fx.partition.contract import Plan, Shapes, Stages, shape_of
from attnres_fx.partition.gradients import TiedGradients, scale_gradients, total_norm
from attnres_fx.partition.microbatches import MeanLoss, Microbatches, join_outputs, split_batch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from attnres_fx.partition.pipeline_hooks import SourceStage
    from attnres_fx.partition.step_log import HopBytes

OLDEST_TORCH = (2, 13)
DataParallel = Literal["fsdp2", "ddp"]


def check_torch() -> None:
    """Raises PipelineError where torch is older than the pipeline runtime needs."""
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < OLDEST_TORCH:
        raise PipelineError(
            f"the pipeline runtime needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer and found "
            f"{torch.__version__}: install a newer torch. Planning and building stages work with the one you have."
        )


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
        from attnres_fx.partition.pipeline_hooks import build_schedule

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
        and where a neighbour was lost (then the job has to start again from a checkpoint).
        """
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
        batches = self._start(args, kwargs, target)
        modes = {module: module.training for module in self.modules.values()}
        last, outputs = self.stages[-1], None
        try:
            with torch.no_grad(), self._lost_neighbours():
                self.train(False)
                self._run(self._forward_only)
                if last.is_last:
                    outputs = self._log.attempt("joining the outputs", lambda: self._join(last.outputs, batches))
                loss, failed = self._agree()
            self._raise_failure(failed)
        finally:
            self._clear()
            for module, mode in modes.items():
                module.train(mode)
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
        shapes = self._shapes_for(flat[0])
        for stage in self.stages:
            stage.flat_inputs, stage.shapes = flat, shapes
        if self.stages[-1].is_last:
            total = batches.counts.sum()
            if self._replicas is not None:
                with self._lost_neighbours():
                    dist.all_reduce(total, group=self._replicas)
            self._loss.start(batches, total)
        return batches

    def _shapes_for(self, flat: Sequence[Any]) -> Shapes:
        key = tuple(shape_of(x) if isinstance(x, Tensor) else repr(x) for x in flat)
        if key not in self._shapes:
            self._shapes[key] = self._contract.shapes(flat)
        return self._shapes[key]

    def _run(self, schedule: Any) -> None:
        from attnres_fx.partition.pipeline_hooks import run_schedule

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
        """Raises, on every rank alike, what stages met on any of them; the pipeline can go on after that."""
        if failed:
            raise PipelineError(
                f"a stage failed, and the step was not done: {failed}. Actions are named <virtual stage><F, B, I or "
                f"W><microbatch>. Call zero_grad() before the next step."
            ) from (self._log.failure[1] if self._log.failure is not None else None)

    @contextlib.contextmanager
    def _lost_neighbours(self) -> Iterator[None]:
        """Says where this rank stood when communication broke, after which there is no going on."""
        try:
            yield
        except Exception as error:
            numbers = [stage.stage_index for stage in self.stages]
            self._broken = self._log.lost(error, rank=dist.get_rank(self._group), stages=numbers)
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

    def train(self, mode: bool = True) -> "Pipeline":
        """Train or eval mode of every stage of this rank."""
        for module in self.modules.values():
            module.train(mode)
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


def build_pipeline(
    stages: Stages,
    plan: Plan,
    *,
    loss_fn: Callable[[Any, Any], Tensor],
    mesh: "DeviceMesh | None" = None,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
    data_parallel: DataParallel | None = None,
    compile: bool | str | None = None,
    ignore_index: int = -100,
) -> Pipeline:
    """This rank's pipeline, on process groups that are already started (`torchrun`, `init_process_group`).

    loss_fn: (model output, target) -> mean over the target's elements that are not `ignore_index`. mesh: with a
    dimension "pp" and, for data parallelism, "dp"; or `group`: the pipeline's ranks (default: all). device: where
    stages run; by default the current accelerator under NCCL, the CPU otherwise. data_parallel: shard ("fsdp2") or
    replicate ("ddp") every stage over "dp". compile: each stage through `torch.compile` (a string names the
    backend); on by default, except under zero bubble, which does not allow it.

    Raises PipelineError where torch is too old, the world is not the plan's, or options do not go together.
    """
    check_torch()
    from attnres_fx.partition import building

    if isinstance(compile, str) or compile is None:
        backend, wanted = compile or "inductor", plan.schedule != building.ZERO_BUBBLE or isinstance(compile, str)
    else:
        backend, wanted = "inductor", compile
    groups = building.process_groups(plan, mesh, group, data_parallel)
    modules = building.local_stages(stages, plan, groups)
    building.check_options(modules, plan, data_parallel, compiled=wanted)
    where = building.pick_device(device, groups.pipeline)
    for module in modules.values():
        module.to(where)
    building.join_tied(stages, modules, separate=data_parallel is not None)
    building.tied_gradients(stages, modules, groups).broadcast()
    wrapped = {c: building.replicate(m, groups, data_parallel) for c, m in modules.items()}
    if wanted:
        for module in modules.values():
            module.compile(backend=backend)
    pipeline_stages = building.pipeline_stages(stages, modules, wrapped, groups.pipeline, where)
    replicas = dist.get_world_size(groups.replicas) if groups.replicas is not None else 1
    loss = MeanLoss(loss_fn, stages.unflatten, replicas)
    return Pipeline(
        stages,
        modules,
        pipeline_stages,
        plan,
        loss,
        building.tied_gradients(stages, modules, groups),
        ignore_index=ignore_index,
        device=where,
        group=groups.pipeline,
        replicas=groups.replicas,
    )
