"""From a plan and a rank to a pipeline that trains: stages, sources, loss, tied parameters, data parallelism.

`torch.distributed.pipelining` runs the schedule; the routes of the stages say which values travel. Needs torch 2.13.
"""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.exc import InvalidBackend

from attnres_fx.errors import PipelineError
from attnres_fx.partition.pipeline_schedule import PipelineSchedule
from attnres_fx.partition.plan.plan import Plan
from attnres_fx.partition.runtime.agreement import facts_of, facts_of_ranks, require_same
from attnres_fx.partition.runtime.gradients import TiedGradients, TiedGroup
from attnres_fx.partition.runtime.microbatches import MeanLoss
from attnres_fx.partition.runtime.pipeline import Pipeline
from attnres_fx.partition.runtime.process_groups import ProcessGroups, select_device, select_process_groups
from attnres_fx.partition.runtime.step_log import StepLog
from attnres_fx.partition.runtime.step_runner import StepRunner
from attnres_fx.partition.split.stage import Stage
from attnres_fx.partition.split.stages import Stages

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from attnres_fx.partition.runtime.source_stage import SourceStage  # needs the torch that check_torch() asks for

__all__ = ["build_pipeline", "check_torch"]

OLDEST_TORCH = (2, 13)
DataParallel = Literal["fsdp2", "ddp"]


def check_torch() -> None:
    """Checks the version of torch.

    Raises:
        PipelineError: It is older than the pipeline runtime needs.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise PipelineError(
            f"the pipeline runtime needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer and found "
            f"{torch.__version__}: install a newer torch. Planning and building stages work with the one you have."
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

    Args:
        stages: From `build_stages`; at least those of this rank. They are moved to the device, and compiled or
            sharded where asked for, in place.
        plan: The plan that the stages were built from.
        loss_fn: (model output, target) -> scalar, the mean over the target's elements that are not `ignore_index`.
        mesh: With a dimension "pp" and, for data parallelism, "dp".
        group: The pipeline's ranks, where there is no mesh; by default all.
        device: Where stages run; by default the current accelerator under NCCL, and the CPU otherwise.
        data_parallel: Shard ("fsdp2") or replicate ("ddp") every stage over "dp".
        compile: Each stage through `torch.compile`; a string names the backend. On by default, except under zero
            bubble, which does not allow it.
        ignore_index: Elements of an integer target that do not count.

    Returns:
        The pipeline of this rank.

    Raises:
        PipelineError: torch is too old, the process groups are not the plan's, options exclude each other, or the
            ranks were given different plans, configs or options.
    """
    check_torch()
    groups = select_process_groups(plan, mesh, group, data_parallel)
    modules = select_stages(stages, plan, groups)
    schedule = check_options(modules, plan, data_parallel, compile)
    facts = facts_of(stages, plan, data_parallel=data_parallel, compile=compile, ignore_index=ignore_index)
    advice = "Give every rank the same plan, stages built from it, and options."
    for ranks in (groups.pipeline, groups.replicas):
        if ranks is not None:
            require_same(facts_of_ranks(facts, ranks), advice)
    target_device = select_device(device, groups.pipeline)
    for module in modules.values():
        module.to(target_device)
    join_tied(stages, modules, separate=data_parallel is not None)
    tied_gradients(stages, modules, groups).broadcast()
    wrapped = {c: replicate(m, groups, data_parallel) for c, m in modules.items()}
    if compile or (compile is None and not schedule.splits_backward):
        compile_stages(modules, compile if isinstance(compile, str) else "inductor")
    runner = StepRunner(
        stages,
        modules,
        source_stages(wrapped, plan, groups, target_device),
        MeanLoss(loss_fn, stages.unflatten, groups.num_replicas),
        groups,
        num_microbatches=plan.num_microbatches,
        ignore_index=ignore_index,
        device=target_device,
    )
    return Pipeline(plan, schedule, runner, tied_gradients(stages, modules, groups))


def select_stages(stages: Stages, plan: Plan, groups: ProcessGroups) -> dict[int, Stage]:
    """This rank's virtual stages by index, ascending.

    Raises:
        PipelineError: They were built from another plan, not on this rank, or have no weights.
    """
    sizes = (stages.num_stages, stages.virtual_stages)
    if sizes != (plan.num_stages, plan.virtual_stages):
        raise PipelineError(
            f"the stages were built for num_stages={sizes[0]}, virtual_stages={sizes[1]} and the plan has "
            f"{plan.num_stages} and {plan.virtual_stages}: build the stages from this plan."
        )
    indices = range(groups.rank, plan.num_stages * plan.virtual_stages, plan.num_stages)
    by_index = {s.route.stage: s for s in stages}
    missing = [c for c in indices if c not in by_index]
    if missing:
        raise PipelineError(
            f"virtual stages {missing} run on rank {groups.rank} and were not built: build them on this rank."
        )
    for c in indices:
        empty = [n for n, p in by_index[c].named_parameters() if p.is_meta]
        if empty:
            raise PipelineError(
                f"parameter {empty[0]!r} of virtual stage {c} has no memory (it is on `meta`): build the stage with "
                f"its weights, or call to_empty() on it and load them before the pipeline is built."
            )
    return {c: by_index[c] for c in indices}


def check_options(
    modules: Mapping[int, nn.Module], plan: Plan, data_parallel: str | None, compile: bool | str | None
) -> PipelineSchedule:
    """The plan's schedule.

    Raises:
        PipelineError: It would not run with these options, or would run and compute something else.
    """
    if plan.schedule not in list(PipelineSchedule):
        raise PipelineError(f"schedule {str(plan.schedule)!r} is not one of {', '.join(PipelineSchedule)}.")
    schedule = PipelineSchedule(plan.schedule)
    if schedule.single_stage and plan.virtual_stages != 1:
        others = ", ".join(s for s in PipelineSchedule if not s.single_stage)
        raise PipelineError(
            f"schedule {str(schedule)!r} runs one stage a rank and the plan has virtual_stages="
            f"{plan.virtual_stages}: choose one of {others}, or virtual_stages=1."
        )
    if not schedule.splits_backward:
        return schedule
    if data_parallel == "ddp":
        raise PipelineError(
            f'data_parallel="ddp" does not go with schedule {str(schedule)!r}: gradients would silently not be '
            f'reduced. Use "fsdp2", or another schedule.'
        )
    if compile or any(_is_compiled(m) for module in modules.values() for m in module.modules()):
        raise PipelineError(
            f"compiled stages do not go with schedule {str(schedule)!r}: their gradients are silently wrong. Leave "
            f"`compile` out and the stages uncompiled, or choose another schedule."
        )
    return schedule


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def join_tied(stages: Stages, modules: Mapping[int, nn.Module], *, separate: bool) -> None:
    """Make tied parameters of this rank one object.

    separate: one object a stage, because data parallelism wraps every stage on its own; their gradients are summed.
    """
    for group in stages.tied:
        objects: dict[int, nn.Parameter] = {}
        for c, name in group:
            if c not in modules:
                continue
            key = c if separate else -1
            if key not in objects:
                parameter = modules[c].get_parameter(name)
                if any(parameter is other for other in objects.values()):
                    parameter = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                objects[key] = parameter
            owner, _, leaf = name.rpartition(".")
            modules[c].get_submodule(owner).register_parameter(leaf, objects[key])


def tied_gradients(stages: Stages, modules: Mapping[int, nn.Module], groups: ProcessGroups) -> TiedGradients:
    """The tied parameters as they are now: wrapping for data parallelism replaces them."""
    tied = []
    for group in stages.tied:
        ranks = tuple(dict.fromkeys(c % stages.num_stages for c, _ in group))
        local = {id(p): p for p in (modules[c].get_parameter(n) for c, n in group if c in modules)}
        tied.append(TiedGroup(ranks, tuple(local.values()), is_owner=ranks[0] == groups.rank))
    return TiedGradients(tied, groups.pipeline)


def replicate(module: nn.Module, groups: ProcessGroups, data_parallel: str | None) -> nn.Module:
    """The module that the schedule calls: the stage itself, sharded in place, or wrapped."""
    if data_parallel == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=groups.replica_mesh)
    if data_parallel == "ddp" and any(p.requires_grad for p in module.parameters()):
        # A stage may hold parameters that nothing in it reads: the graph of the last microbatch tells which.
        return nn.parallel.DistributedDataParallel(
            module, process_group=groups.replicas, broadcast_buffers=False, find_unused_parameters=True
        )
    return module


def compile_stages(modules: Mapping[int, nn.Module], backend: str) -> None:
    """Compile each stage in place: parameter names stay."""
    try:
        for module in modules.values():
            module.compile(backend=backend)
    except InvalidBackend as error:
        raise PipelineError(f'compile={backend!r} is no backend of torch.compile; True is "inductor".') from error


def source_stages(
    wrapped: Mapping[int, nn.Module], plan: Plan, groups: ProcessGroups, device: torch.device
) -> list["SourceStage"]:
    """This rank's stages for PyTorch's schedules."""
    from attnres_fx.partition.runtime.source_stage import SourceStage

    log, count = StepLog(), plan.num_stages * plan.virtual_stages
    return [
        SourceStage(module, c, count, log=log, device=device, group=groups.pipeline, replicas=groups.replicas)
        for c, module in wrapped.items()
    ]
