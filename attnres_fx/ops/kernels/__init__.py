"""Depth attention on Triton kernels. Importing this imports no Triton: `usable` says whether it is there."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnres_fx.ops.dtypes import result_dtype
from attnres_fx.ops.kernels.availability import kernel_device, why_not
from attnres_fx.ops.kernels.layout import MOST_SOURCES, MOST_WIDTH
from attnres_fx.ops.kernels.tuning import Launch, launch_with
from attnres_fx.ops.read_tensors import ReadOptions, ReadTensors, promoted_dtype

if TYPE_CHECKING:
    from attnres_fx.ops.kernels.autograd import ReadDefinition
    from attnres_fx.ops.recompute import Definition

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_logged: set[str] = set()


def usable(sources: Sequence[Tensor], *others: Tensor | None) -> bool:
    """Whether a read of these sources runs on the kernels; the log says once why one on a GPU does not.

    Args:
        sources: S >= 1 tensors [..., D].
        others: the other tensors of the read; only their dtypes count.
    """
    if not kernel_device(sources[0]):
        return False
    reason = why_not() or _unsupported(sources, others)
    if reason:
        _say(reason)
    return reason is None


def takes(tensors: ReadTensors[Tensor]) -> bool:
    """`usable`, for all that a read takes."""
    weights = (tensors.query, tensors.key_weight, tensors.bias, tensors.norm_weight, tensors.norm_bias)
    return usable(tensors.sources, *weights, tensors.delta, tensors.carry)


def _say(reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        log.warning("depth attention runs as its definition, not on the Triton kernels: %s", reason)


def batches(sources: Sequence[Tensor]) -> bool:
    """Whether phase 1 over sources like these, [..., D], would run on the kernels, which read each once for all.

    Unlike `batch_usable` it writes nothing to the log.
    """
    known = kernel_device(sources[0]) and len(sources) <= MOST_SOURCES
    return known and why_not() is None and _unsupported(sources, ()) is None


def described(sources: Sequence[Tensor]) -> str:
    """What a read of these sources, [..., D], runs on, in words: `"Triton"`, or aten and why."""
    if not kernel_device(sources[0]):
        return f"aten, by the inner compiler ({sources[0].device.type})"
    reason = why_not() or _unsupported(sources, ())
    return "Triton" if reason is None else f"aten, by the inner compiler ({reason})"


def _unsupported(sources: Sequence[Tensor], others: Sequence[Tensor | None]) -> str | None:
    width = int(sources[0].shape[-1])  # a kernel is compiled for one width: a symbolic one becomes fixed here
    if width == 0 or width > MOST_WIDTH:
        return f"sources are {width} wide; the kernels take 1 to {MOST_WIDTH}"
    dtypes = {t.dtype for t in (*sources, *others) if t is not None}
    if not dtypes <= set(_DTYPES):
        return f"the kernels take float32, bfloat16 and float16, not {', '.join(sorted(map(str, dtypes)))}"
    return None


def kernel_read(tensors: ReadTensors[Tensor], options: ReadOptions, definition: "ReadDefinition") -> list[Tensor]:
    """A read on the kernels, differentiable (arXiv 2603.15031, section 3.1).

    Args:
        tensors: of the read; `takes` has said yes to them.
        options: of the read.
        definition: the same read as differentiable aten operations, for gradients of gradients.

    Returns:
        The read, with a delta the new last source, and the sources where the options ask for them; [..., D] each.
    """
    from attnres_fx.ops.kernels.autograd import KernelRead

    options = replace(options, dtype=options.dtype or promoted_dtype(tensors))
    out, partial, *views = KernelRead.apply(options, definition, *tensors.to_flat())
    return [out, *([partial] if tensors.delta is not None else []), *views]


def kernel_batch(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    eps: float,
    definition: "Definition",
    *,
    bias: Tensor | None = None,
    value_norm: bool = False,
) -> list[Tensor]:
    """Phase 1 on the kernels, differentiable.

    Args:
        sources: at most 16 tensors [..., D].
        queries: Q tensors [D].
        key_weights: Q tensors [D].
        eps: added to the mean square of a source.
        definition: the same as differentiable aten operations, from Q weights [Q, D] (a query times its key gain,
            float32), the bias or None, and the sources.
        bias: [Q, S], added to the logits.
        value_norm: whether values are divided by their root mean square.

    Returns:
        Q outputs [..., D], then Q log-sum-exps [...].
    """
    from attnres_fx.ops.kernels.batch_launch import BatchOptions, batch_of

    return batch_of(
        sources, queries, key_weights, BatchOptions(eps, result_dtype(sources), value_norm), definition, bias
    )


def batch_usable(sources: Sequence[Tensor], *others: Tensor | None) -> bool:
    """`usable`, for phase 1, whose kernels take at most 16 sources."""
    if not kernel_device(sources[0]):
        return False
    if len(sources) > MOST_SOURCES:
        _say(f"phase 1 over {len(sources)} sources; its kernels take up to {MOST_SOURCES}")
        return False
    return usable(sources, *others)


__all__ = [
    "Launch",
    "batch_usable",
    "batches",
    "described",
    "kernel_batch",
    "kernel_read",
    "launch_with",
    "takes",
    "usable",
]
