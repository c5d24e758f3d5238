"""A read of any number of sources as a chain of kernels, of at most 16 sources each.

The mixture of one group is carried into the next, in float32; only the last group has a gain, a delta and a norm.
All tensors are rows here: [N, D], and [N] for the log-sum-exp of a carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.epilogue import NormKind
from attnres_fx.ops.kernels import read_launch  # registers read_forward and read_backward
from attnres_fx.ops.kernels.layout import MOST_SOURCES
from attnres_fx.ops.read_tensors import ReadOptions, ReadTensors


@dataclass(frozen=True)
class GroupStatistics:
    """What a group's forward leaves for its backward.

    Args:
        lse: [N], log-sum-exp of the logits, those of the groups before among them.
        stats: [2, S, N], logits and reciprocal root mean squares of the sources.
        norm_stats: [2, N], mean and reciprocal scale of the read; empty without a norm.
        mixed: [N, D] float32, what is carried into the next group; None for the last group.
    """

    lse: Tensor
    stats: Tensor
    norm_stats: Tensor
    mixed: Tensor | None

    def to_flat(self) -> tuple[Tensor | None, ...]:
        """Its fields, for `save_for_backward`."""
        return self.lse, self.stats, self.norm_stats, self.mixed


def statistics_from_flat(values: Sequence[Any]) -> list[GroupStatistics]:
    """The groups whose `to_flat` were saved one after the other."""
    return [GroupStatistics(*values[start : start + 4]) for start in range(0, len(values), 4)]


def forward_in_groups(
    tensors: ReadTensors[Tensor], options: ReadOptions, saves: bool
) -> tuple[Tensor, Tensor, list[GroupStatistics]]:
    """The read, group after group.

    Args:
        tensors: of the read, as rows.
        options: of the read, with a dtype.
        saves: whether backward will need the statistics of sources and norm; they are empty otherwise.

    Returns:
        The read [N, D] in the options' dtype, the sum of last source and delta [N, D] (empty without a delta), and
        the statistics of every group.
    """
    statistics: list[GroupStatistics] = []
    for group in _groups(len(tensors.sources)):
        part, part_options = _group_read(tensors, options, group, statistics[-1] if statistics else None)
        out, partial, lse, stats, norm_stats = torch.ops.attnres_fx.read_forward(
            part.sources,
            part.query,
            part.key_weight,
            part_options.eps,
            part_options.gain,
            part.delta,
            part.carry,
            part.carry_lse,
            part_options.norm,
            part.norm_weight,
            part.norm_bias,
            part_options.norm_eps,
            part_options.dtype,
            saves,
            part.bias,
            part_options.value_norm,
        )
        is_last = group.stop == len(tensors.sources)
        statistics.append(GroupStatistics(lse, stats, norm_stats, None if is_last else out))
    return out, partial, statistics


def backward_in_groups(
    tensors: ReadTensors[Tensor],
    options: ReadOptions,
    statistics: Sequence[GroupStatistics],
    grad_out: Tensor,
    other_grads: Sequence[Tensor | None],
    needs: ReadTensors[bool],
) -> ReadTensors[Tensor | None]:
    """Gradients of the read, the last group first.

    Args:
        tensors: of the read, as rows, with the delta in the last source.
        options: of the read.
        statistics: what `forward_in_groups` returned.
        grad_out: [N, D], gradient of the read.
        other_grads: [N, D] or None for every source: its gradient from its other users, added inside the kernel.
        needs: for which tensors a gradient is needed.

    Returns:
        Gradients, as rows; None where none is needed or there is no such tensor.
    """
    by_group: list[ReadTensors[Tensor | None]] = []
    grad_mixed: Tensor | None = grad_out
    grad_lse: Tensor | None = None
    for i, group in reversed(list(enumerate(_groups(len(tensors.sources))))):
        part, part_options = _group_read(tensors, options, group, statistics[i - 1] if i else None)
        part_needs = replace(needs, sources=needs.sources[group])
        outer_grads = (grad_mixed, grad_lse, other_grads[group])
        grads = _group_backward(part, part_options, statistics[i], outer_grads, part_needs)
        by_group.append(grads)
        grad_mixed, grad_lse = grads.carry, grads.carry_lse
    last, first = by_group[0], by_group[-1]
    return ReadTensors(
        sources=tuple(g for grads in reversed(by_group) for g in grads.sources),
        query=_sum([g.query for g in by_group]),
        key_weight=_sum([g.key_weight for g in by_group]),
        norm_weight=last.norm_weight,
        norm_bias=last.norm_bias,
        carry=first.carry,
        carry_lse=first.carry_lse,
        bias=None if tensors.bias is None else torch.cat([g.bias for g in reversed(by_group) if g.bias is not None]),
    )


def _groups(count: int) -> list[slice]:
    """As few groups as can be, of sizes as even as can be."""
    groups = -(-count // MOST_SOURCES)
    size = -(-count // groups)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _group_read(
    tensors: ReadTensors[Tensor], options: ReadOptions, group: slice, before: GroupStatistics | None
) -> tuple[ReadTensors[Tensor], ReadOptions]:
    """A group as a read of its own, that goes on from the group before it."""
    part = replace(tensors, sources=tensors.sources[group], bias=None if tensors.bias is None else tensors.bias[group])
    if before is not None:
        part = replace(part, carry=before.mixed, carry_lse=before.lse)
    if group.stop == len(tensors.sources):
        return part, options
    without_norm = replace(options, gain=1.0, norm=int(NormKind.NONE), dtype=torch.float32)
    return replace(part, delta=None, norm_weight=None, norm_bias=None), without_norm


def _group_backward(
    tensors: ReadTensors[Tensor],
    options: ReadOptions,
    statistics: GroupStatistics,
    outer_grads: tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]],
    needs: ReadTensors[bool],
) -> ReadTensors[Tensor | None]:
    """Gradients of one group; outer_grads: those of its mixture and log-sum-exp, and the sources' other gradients."""
    weights_need = bool(needs.query or needs.key_weight)
    (
        *grad_sources,
        grad_query,
        grad_key_weight,
        grad_norm_weight,
        grad_norm_bias,
        grad_carry,
        grad_carry_lse,
        grad_bias,
    ) = torch.ops.attnres_fx.read_backward(
        *outer_grads,
        tensors.sources,
        tensors.query,
        tensors.key_weight,
        options.gain,
        tensors.carry,
        tensors.carry_lse,
        options.norm,
        tensors.norm_weight,
        tensors.norm_bias,
        statistics.lse,
        statistics.stats,
        statistics.norm_stats,
        list(needs.sources),
        weights_need,
        tensors.bias,
        options.value_norm,
    )
    return ReadTensors(
        sources=tuple(g if need else None for g, need in zip(grad_sources, needs.sources, strict=True)),
        query=grad_query if weights_need else None,
        key_weight=grad_key_weight if weights_need else None,
        norm_weight=None if tensors.norm_weight is None else grad_norm_weight,
        norm_bias=None if tensors.norm_bias is None else grad_norm_bias,
        carry=None if tensors.carry is None else grad_carry,
        carry_lse=None if tensors.carry is None else grad_carry_lse,
        bias=None if tensors.bias is None else grad_bias,
    )


def _sum(grads: Sequence[Tensor | None]) -> Tensor | None:
    present = [g for g in grads if g is not None]
    return reduce(torch.add, present) if present else None


__all__ = ["GroupStatistics", "backward_in_groups", "forward_in_groups", "read_launch", "statistics_from_flat"]
