"""The process groups that a pipeline runs on, from what the caller names."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from attnres_fx.errors import PipelineError
from attnres_fx.partition.plan.plan import Plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ProcessGroups:
    """Process groups of one rank.

    Attributes:
        pipeline: The ranks that hold one copy of the model.
        replicas: The ranks that hold the same stages as this one, under data parallelism.
        replica_mesh: The same as a mesh.
    """

    pipeline: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    replica_mesh: "DeviceMesh | None"

    @property
    def rank(self) -> int:
        """This rank's number in the pipeline."""
        return dist.get_rank(self.pipeline)

    @property
    def num_replicas(self) -> int:
        """Copies of the model; 1 without data parallelism."""
        return 1 if self.replicas is None else dist.get_world_size(self.replicas)


def select_process_groups(
    plan: Plan, mesh: "DeviceMesh | None", group: dist.ProcessGroup | None, data_parallel: str | None
) -> ProcessGroups:
    """The groups that the options of `build_pipeline` name.

    Raises:
        PipelineError: No group is started, or they are not what the plan needs.
    """
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
    size = dist.get_world_size(pipeline)
    if size != plan.num_stages:
        raise PipelineError(
            f"the plan is for num_stages={plan.num_stages} ranks and the pipeline's group has {size}: start "
            f"{plan.num_stages} processes for it (torchrun --nproc_per_node), or plan with num_stages={size}."
        )
    replica_mesh = mesh["dp"] if mesh is not None and data_parallel is not None else None
    return ProcessGroups(pipeline, replica_mesh.get_group() if replica_mesh is not None else None, replica_mesh)


def select_device(device: torch.device | str | None, group: dist.ProcessGroup) -> torch.device:
    """The device asked for; by default the current accelerator under NCCL, and the CPU otherwise."""
    if device is not None:
        return torch.device(device)
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
