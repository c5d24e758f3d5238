"""Gradients that concern more than one stage: tied parameters, and the norm of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class TiedGroup:
    """One parameter of the model that several stages hold.

    Attributes:
        ranks: The ranks of the pipeline that hold it, the owner's first.
        local: This rank's parameters of the group: one object, unless data parallelism wraps each stage on its own.
        is_owner: Whether this rank counts it in norms.
    """

    ranks: tuple[int, ...]
    local: tuple[nn.Parameter, ...]
    is_owner: bool

    @property
    def copies(self) -> tuple[nn.Parameter, ...]:
        """This rank's parameters that a norm over all ranks must not count again."""
        return self.local[1:] if self.is_owner else self.local


def _exchange(tensor: Tensor, ranks: Sequence[int], group: dist.ProcessGroup, *, add: bool) -> None:
    """The owner's value, or the sum of all (always added in the order of the ranks), on every rank of a group."""
    owner, others = ranks[0], ranks[1:]
    if dist.get_rank(group) == owner:
        if add:
            for rank in others:
                part = torch.empty_like(tensor)
                dist.recv(part, group=group, group_src=rank)
                tensor += part
        for rank in others:
            dist.send(tensor, group=group, group_dst=rank)
        return
    if add:
        dist.send(tensor, group=group, group_dst=owner)
    dist.recv(tensor, group=group, group_src=owner)


class TiedGradients:
    """Keeps tied parameters equal: the owner's values at the start, the sum of all gradients after every step."""

    def __init__(self, groups: Sequence[TiedGroup], process_group: dist.ProcessGroup) -> None:
        self.groups = tuple(g for g in groups if g.local)
        self.process_group = process_group
        self._accumulated: dict[int, Tensor | None] = {}

    def broadcast(self) -> None:
        """The owner's values everywhere."""
        with torch.no_grad():
            for group in self.groups:
                value = local_shard(group.local[0]).detach().clone().contiguous()
                _exchange(value, group.ranks, self.process_group, add=False)
                for parameter in group.local:
                    local_shard(parameter).copy_(value)

    def start(self) -> None:
        """Put the gradients of earlier steps aside: only this step's are summed over the ranks."""
        for parameter in self._parameters():
            self._accumulated[id(parameter)] = parameter.grad
            parameter.grad = None

    def finish(self, *, add: bool) -> None:
        """Put the gradients of earlier steps back; with `add`, after a step that succeeded, plus the sum of its own."""
        with torch.no_grad():
            for group in self.groups if add else ():
                self._sum(group)
            for parameter in self._parameters():
                accumulated = self._accumulated.pop(id(parameter), None)
                if accumulated is not None:
                    new = parameter.grad if add else None
                    parameter.grad = accumulated if new is None else accumulated + new

    def _sum(self, group: TiedGroup) -> None:
        if not group.local[0].requires_grad or (len(group.ranks) == 1 and len(group.local) == 1):
            return
        total = torch.zeros_like(local_shard(group.local[0])).contiguous()
        for parameter in group.local:
            if parameter.grad is not None:
                total += local_shard(parameter.grad)
        _exchange(total, group.ranks, self.process_group, add=True)
        for parameter in group.local:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            local_shard(parameter.grad).copy_(total)

    def _parameters(self) -> list[nn.Parameter]:
        return list({id(p): p for group in self.groups for p in group.local}.values())


def total_norm(
    parameters: Sequence[nn.Parameter],
    *,
    norm_type: float,
    pipeline: dist.ProcessGroup,
    replicas: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    """Norm of the gradients of all ranks' parameters together.

    Args:
        parameters: This rank's, each of which is counted once over all ranks of the pipeline.
        norm_type: The p of the norm, or infinity.
        pipeline: The ranks that hold one copy of the model.
        replicas: The ranks over which sharded gradients are spread, if any are.
        device: Where the result is.

    Returns:
        A float64 scalar, the same number on every rank.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]

    def local_norm(*, sharded: bool) -> Tensor:
        shards = [local_shard(g) for g in gradients if isinstance(g, DTensor) is sharded]
        # get_total_norm alone would work in the gradients' own dtype, bfloat16 too.
        norms = [torch.linalg.vector_norm(s, norm_type, dtype=_at_least_float32(s)) for s in shards if s.numel()]
        return get_total_norm([n.to(device, torch.float64) for n in norms], norm_type).to(device, torch.float64)

    sharded = local_norm(sharded=True)
    if replicas is not None:
        sharded = _norm_over_ranks(sharded, norm_type, replicas)
    return _norm_over_ranks(get_total_norm([sharded, local_norm(sharded=False)], norm_type), norm_type, pipeline)


def _norm_over_ranks(norm: Tensor, norm_type: float, group: dist.ProcessGroup) -> Tensor:
    """The norm of every rank's numbers together, from the norm of each rank's."""
    if norm_type == float("inf"):
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        return norm
    power = norm.pow(norm_type)
    dist.all_reduce(power, dist.ReduceOp.SUM, group=group)
    return power.pow(1 / norm_type)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def scale_gradients(parameters: Sequence[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient in place by a scalar, which is cast to the gradient's dtype first."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                shard = local_shard(parameter.grad)
                shard.mul_(factor.to(shard.dtype))
