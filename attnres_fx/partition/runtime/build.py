"""The steps from stages and a plan to what a pipeline is made of, and everything that is refused on the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.exc import InvalidBackend

from attnres_fx.errors import PipelineError
from attnres_fx.partition.runtime.contract import Plan, Stages
from attnres_fx.partition.runtime.gradients import TiedGradients, TiedGroup
from attnres_fx.partition.runtime.stage_hooks import MULTI_STAGE, SourceStage
from attnres_fx.partition.runtime.step_log import StepLog

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ZERO_BUBBLE = "InterleavedZeroBubble"
SCHEDULES = ("GPipe", "1F1B", *MULTI_STAGE)


@dataclass(frozen=True)
class Groups:
    """pipeline: ranks that hold one copy of the model. replicas: ranks that hold the same stages, if any do."""

    pipeline: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    replica_mesh: "DeviceMesh | None"


def process_groups(
    plan: Plan, mesh: "DeviceMesh | None", group: dist.ProcessGroup | None, data_parallel: str | None
) -> Groups:
    """The groups that the options name; raises PipelineError where they are not the plan's."""
    if not dist.is_initialized():
        raise PipelineError(
            "no process group is started: run under torchrun and call torch.distributed.init_process_group() first."
        )
    if data_parallel not in (None, "fsdp2", "ddp"):
        raise PipelineError(f'data_parallel={data_parallel!r} is not known: give "fsdp2", "ddp" or None.')
    names = (mesh.mesh_dim_names or ()) if mesh is not None else ()
    if mesh is not None and "pp" not in names:
        raise PipelineError(f'the mesh has dimensions {names}: name the pipeline\'s "pp" (mesh_dim_names).')
    if data_parallel is not None and "dp" not in names:
        raise PipelineError(
            f'data_parallel={data_parallel!r} needs a mesh with dimensions "dp" and "pp": '
            f'init_device_mesh(device_type, (replicas, {plan.num_stages}), mesh_dim_names=("dp", "pp")).'
        )
    pipeline = mesh["pp"].get_group() if mesh is not None else group or dist.distributed_c10d._get_default_group()
    found = dist.get_world_size(pipeline)
    if found != plan.num_stages:
        raise PipelineError(
            f"the plan is for num_stages={plan.num_stages} ranks and the pipeline's group has {found}: start "
            f"{plan.num_stages} processes for it (torchrun --nproc_per_node), or plan with num_stages={found}."
        )
    replica_mesh = mesh["dp"] if mesh is not None and data_parallel is not None else None
    return Groups(pipeline, replica_mesh.get_group() if replica_mesh is not None else None, replica_mesh)


def local_stages(stages: Stages, plan: Plan, groups: Groups) -> dict[int, nn.Module]:
    """This rank's virtual stages by index, ascending."""
    given = (stages.num_stages, stages.virtual_stages)
    if given != (plan.num_stages, plan.virtual_stages):
        raise PipelineError(
            f"the stages were built for num_stages={given[0]}, virtual_stages={given[1]} and the plan has "
            f"{plan.num_stages} and {plan.virtual_stages}: build the stages from this plan."
        )
    rank = dist.get_rank(groups.pipeline)
    wanted = range(rank, plan.num_stages * plan.virtual_stages, plan.num_stages)
    found = {s.route.stage: cast(nn.Module, s) for s in stages}
    missing = [c for c in wanted if c not in found]
    if missing:
        raise PipelineError(f"virtual stages {missing} run on rank {rank} and were not built: build them on this rank.")
    for c in wanted:
        empty = [n for n, p in found[c].named_parameters() if p.is_meta]
        if empty:
            raise PipelineError(
                f"parameter {empty[0]!r} of virtual stage {c} has no memory (it is on `meta`): build the stage with "
                f"its weights, or call to_empty() on it and load them before the pipeline is built."
            )
    return {c: found[c] for c in wanted}


def check_options(modules: Mapping[int, nn.Module], plan: Plan, data_parallel: str | None, *, compiled: bool) -> None:
    """Refuses what would not run, or would run and compute something else."""
    if plan.schedule not in SCHEDULES:
        raise PipelineError(f"schedule {plan.schedule!r} is not one of {', '.join(SCHEDULES)}.")
    if plan.schedule not in MULTI_STAGE and plan.virtual_stages != 1:
        raise PipelineError(
            f"schedule {plan.schedule!r} runs one stage a rank and the plan has virtual_stages="
            f"{plan.virtual_stages}: choose one of {', '.join(MULTI_STAGE)}, or virtual_stages=1."
        )
    if plan.schedule != ZERO_BUBBLE:
        return
    if data_parallel == "ddp":
        raise PipelineError(
            f'data_parallel="ddp" does not go with schedule {ZERO_BUBBLE!r}: gradients would silently not be '
            f'reduced. Use "fsdp2", or another schedule.'
        )
    if compiled or any(_is_compiled(m) for module in modules.values() for m in module.modules()):
        raise PipelineError(
            f"compiled stages do not go with schedule {ZERO_BUBBLE!r}: their gradients are silently wrong. Leave "
            f"`compile` out and the stages uncompiled, or choose another schedule."
        )


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def pick_device(device: torch.device | str | None, group: dist.ProcessGroup) -> torch.device:
    """The device asked for; else the current accelerator under NCCL, and the CPU."""
    if device is not None:
        return torch.device(device)
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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


def tied_gradients(stages: Stages, modules: Mapping[int, nn.Module], groups: Groups) -> TiedGradients:
    """The tied parameters as they are now: wrapping for data parallelism replaces them."""
    rank, count = dist.get_rank(groups.pipeline), dist.get_world_size(groups.pipeline)
    tied = []
    for group in stages.tied:
        ranks = tuple(dict.fromkeys(c % count for c, _ in group))
        here = {id(p): p for p in (modules[c].get_parameter(n) for c, n in group if c in modules)}
        tied.append(TiedGroup(ranks, tuple(here.values()), owns=ranks[0] == rank))
    return TiedGradients(tied, groups.pipeline)


def replicate(module: nn.Module, groups: Groups, data_parallel: str | None) -> nn.Module:
    """What the schedule calls: the module itself, sharded in place, or wrapped."""
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
    """Each stage through `torch.compile`, in place: parameter names stay."""
    try:
        for module in modules.values():
            module.compile(backend=backend)
    except InvalidBackend as error:
        raise PipelineError(f'compile={backend!r} is no backend of torch.compile; True is "inductor".') from error


def pipeline_stages(
    wrapped: Mapping[int, nn.Module], plan: Plan, groups: Groups, device: torch.device
) -> list[SourceStage]:
    """This rank's stages for PyTorch's schedules."""
    log, count = StepLog(), plan.num_stages * plan.virtual_stages
    return [
        SourceStage(module, c, count, log=log, device=device, group=groups.pipeline, replicas=groups.replicas)
        for c, module in wrapped.items()
    ]
