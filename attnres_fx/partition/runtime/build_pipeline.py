"""From a plan and a rank to a pipeline that trains: stages, sources, loss, tied parameters, data parallelism.

`torch.distributed.pipelining` runs the schedule; which values travel is the routes' business. Needs torch 2.13.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_fx.errors import PipelineError
from attnres_fx.partition.runtime.contract import Plan, Stages
from attnres_fx.partition.runtime.microbatches import MeanLoss
from attnres_fx.partition.runtime.pipeline import Evaluation, Pipeline

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Evaluation", "Pipeline", "build_pipeline", "check_torch"]

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
    from attnres_fx.partition.runtime import build as building

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
        building.compile_stages(modules, backend)
    pipeline_stages = building.pipeline_stages(wrapped, plan, groups, where)
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
