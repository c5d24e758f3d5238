"""Gradients that concern more than one stage: tied parameters, and the norm of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class TiedGroup:
    """One parameter of the model that several stages hold.

    ranks: of the pipeline, that hold it, the owner's first. here: this rank's parameters of the group, which are one
    object unless data parallelism wraps each stage on its own. owns: whether this rank counts it in norms.
    """

    ranks: tuple[int, ...]
    here: tuple[nn.Parameter, ...]
    owns: bool


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
    """Keeps tied parameters in step: equal at the start, and given the sum of their gradients after every step."""

    def __init__(self, groups: Sequence[TiedGroup], process_group: dist.ProcessGroup) -> None:
        self.groups = tuple(g for g in groups if g.here)
        self.process_group = process_group
        self._before: dict[int, Tensor | None] = {}

    def broadcast(self) -> None:
        """The owner's values everywhere."""
        with torch.no_grad():
            for group in self.groups:
                value = local(group.here[0]).detach().clone().contiguous()
                _exchange(value, group.ranks, self.process_group, add=False)
                for parameter in group.here:
                    local(parameter).copy_(value)

    def start(self) -> None:
        """Put aside what earlier steps have accumulated: only this step's gradients are to be added up."""
        for parameter in self._parameters():
            self._before[id(parameter)] = parameter.grad
            parameter.grad = None

    def finish(self, *, add: bool) -> None:
        """Sum this step's gradients, unless it failed, and put back the accumulated ones."""
        with torch.no_grad():
            for group in self.groups if add else ():
                self._sum(group)
            for parameter in self._parameters():
                before = self._before.pop(id(parameter), None)
                if before is not None:
                    parameter.grad = before if not add or parameter.grad is None else before + parameter.grad

    def _sum(self, group: TiedGroup) -> None:
        if not group.here[0].requires_grad or (len(group.ranks) == 1 and len(group.here) == 1):
            return
        total = torch.zeros_like(local(group.here[0])).contiguous()
        for parameter in group.here:
            if parameter.grad is not None:
                total += local(parameter.grad)
        _exchange(total, group.ranks, self.process_group, add=True)
        for parameter in group.here:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            local(parameter.grad).copy_(total)

    def _parameters(self) -> list[nn.Parameter]:
        return list({id(p): p for group in self.groups for p in group.here}.values())


def total_norm(
    parameters: Sequence[nn.Parameter],
    *,
    norm_type: float,
    pipeline: dist.ProcessGroup,
    shards: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    """Norm of the gradients of all ranks' parameters together, in float64; the same number on every rank.

    parameters: this rank's, each to be counted once over all ranks of the pipeline. shards: over which sharded
    gradients are spread.
    """
    biggest = norm_type == float("inf")

    def measure(sharded: bool) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None and isinstance(p.grad, DTensor) is sharded]
        norms = [torch.linalg.vector_norm(local(g), norm_type, dtype=_wide(g)) for g in gradients if local(g).numel()]
        parts = torch.stack([torch.zeros((), dtype=torch.float64, device=device), *(n.double() for n in norms)])
        return parts.max() if biggest else parts.pow(norm_type).sum()

    operation = dist.ReduceOp.MAX if biggest else dist.ReduceOp.SUM
    spread, whole = measure(True), measure(False)
    if shards is not None:
        dist.all_reduce(spread, operation, group=shards)
    norm = torch.maximum(spread, whole) if biggest else spread + whole
    dist.all_reduce(norm, operation, group=pipeline)
    return norm if biggest else norm.pow(1 / norm_type)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def scale_gradients(parameters: Sequence[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient in place."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                gradient = local(parameter.grad)
                gradient.mul_(factor.to(gradient.dtype))
