"""Reads of DTensors that are sharded by tokens: each rank reads its own rows, on the kernels.

Depth attention goes row by row, so any sharding but that of the width needs no communication; queries, gains and
norm weights are whole on every rank, and their gradients are partial sums where tokens are sharded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnres_fx.ops import kernels


def read_by_tokens(read: Callable[..., list[Tensor]], args: Sequence[Any]) -> list[Tensor] | None:
    """`read(*args)` on the local rows of DTensors; None where they are none, or not sharded by tokens alone.

    args: tensors, lists of them, and what is none. Rows are the tensors of most dimensions, whole the others [D].
    """
    flat, spec = pytree.tree_flatten(list(args))
    tensors = [a for a in flat if isinstance(a, Tensor)]
    if all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors) or not _available():
        return None
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not all(isinstance(t, DTensor) for t in tensors):
        return None
    dims = max(t.dim() for t in tensors)
    rows: list[Any] = [t for t in tensors if t.dim() == dims]
    weights: list[Any] = [t for t in tensors if t.dim() < dims]
    first = rows[0]
    placed = first.placements
    alike = all(t.placements == placed and t.device_mesh == first.device_mesh for t in rows)
    by_tokens = all(isinstance(p, Replicate) or (isinstance(p, Shard) and p.dim % dims < dims - 1) for p in placed)
    whole = all(p.is_replicate() for t in weights for p in t.placements)
    if dims < 2 or not (alike and by_tokens and whole) or not kernels.usable([first.to_local()]):
        return None
    partial = [Partial() if isinstance(p, Shard) else Replicate() for p in placed]

    def local(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        return value.to_local() if value.dim() == dims else value.to_local(grad_placements=partial)

    outputs = read(*pytree.tree_unflatten([local(a) for a in flat], spec))
    shape, stride = first.shape, torch.empty(first.shape, device="meta").stride()
    return [
        DTensor.from_local(o, first.device_mesh, placed, run_check=False, shape=shape, stride=stride) for o in outputs
    ]


def _available() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
