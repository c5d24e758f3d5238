"""Reads of DTensors that are sharded by tokens: each rank reads its own rows, on the kernels.

Depth attention goes row by row, so any sharding but that of the width needs no communication; queries, gains and
norm weights are whole on every rank, and their gradients are partial sums where tokens are sharded.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops import kernels
from attnres_fx.ops.read_tensors import ReadTensors


def read_by_tokens(
    read: Callable[[ReadTensors[Tensor]], list[Tensor]], tensors: ReadTensors[Tensor]
) -> list[Tensor] | None:
    """A read of DTensors, each rank on its own rows.

    Args:
        read: reads plain tensors; every output is [..., D].
        tensors: of a read without a carry.

    Returns:
        What `read` returns, as DTensors placed as the sources are; None where the tensors are no DTensors, or not
        sharded by tokens alone, or the kernels do not take their rows.
    """
    if not _are_dtensors(tensors) or not _sharded_by_tokens(tensors):
        return None
    from torch.distributed.tensor import DTensor

    first: Any = tensors.sources[0]
    if not kernels.usable([first.to_local()]):
        return None
    outputs = read(_local_rows(tensors))
    shape, stride = first.shape, torch.empty(first.shape, device="meta").stride()
    return [
        DTensor.from_local(o, first.device_mesh, first.placements, run_check=False, shape=shape, stride=stride)
        for o in outputs
    ]


def _are_dtensors(tensors: ReadTensors[Tensor]) -> bool:
    present = tensors.present()
    if all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in present):
        return False
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return all(isinstance(t, DTensor) for t in present)


def _sharded_by_tokens(tensors: ReadTensors[Any]) -> bool:
    """Whether sources and delta are placed alike, with every row whole, and the weights are whole on every rank."""
    from torch.distributed.tensor import Replicate, Shard

    first, dims = tensors.sources[0], tensors.sources[0].dim()
    if dims < 2:
        return False
    rows = [t for t in (*tensors.sources, tensors.delta) if t is not None]
    weights = [t for t in _weights(tensors) if t is not None]
    placed_alike = all(t.placements == first.placements and t.device_mesh == first.device_mesh for t in rows)
    rows_whole = all(
        isinstance(p, Replicate) or (isinstance(p, Shard) and p.dim % dims < dims - 1) for p in first.placements
    )
    return placed_alike and rows_whole and all(p.is_replicate() for t in weights for p in t.placements)


def _local_rows(tensors: ReadTensors[Any]) -> ReadTensors[Tensor]:
    """What this rank holds; the weights' gradients are partial sums over the ranks that share the tokens."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    placements = [Partial() if isinstance(p, Shard) else Replicate() for p in tensors.sources[0].placements]
    query, key_weight, norm_weight, norm_bias, bias = (
        None if t is None else t.to_local(grad_placements=placements) for t in _weights(tensors)
    )
    return replace(
        tensors,
        sources=tuple(s.to_local() for s in tensors.sources),
        query=query,
        key_weight=key_weight,
        delta=None if tensors.delta is None else tensors.delta.to_local(),
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        bias=bias,
    )


def _weights(tensors: ReadTensors[Any]) -> tuple[Any, ...]:
    return tensors.query, tensors.key_weight, tensors.norm_weight, tensors.norm_bias, tensors.bias
