"""Depth attention on Triton kernels. Importing this imports no Triton: `usable` says whether it is there."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnres_fx.ops.epilogue import Epilogue
from attnres_fx.ops.kernels.availability import kernel_device, why_not
from attnres_fx.ops.kernels.layout import MOST_SOURCES, MOST_WIDTH
from attnres_fx.ops.kernels.tuning import Launch, launch_with
from attnres_fx.ops.reference import result_dtype

if TYPE_CHECKING:
    from attnres_fx.ops.recompute import Definition

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_said: set[str] = set()


def usable(sources: Sequence[Tensor], *others: Tensor | None) -> bool:
    """Whether a read of these sources runs on the kernels. Says once in the log why one on a GPU does not."""
    if not kernel_device(sources[0]):
        return False
    reason = why_not() or _unsupported(sources, others)
    if reason:
        _say(reason)
    return reason is None


def _say(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        log.warning("depth attention runs as its definition, not on the Triton kernels: %s", reason)


def batches(sources: Sequence[Tensor]) -> bool:
    """Whether phase 1 over sources like these would run on the kernels, which read them once for all queries."""
    known = kernel_device(sources[0]) and len(sources) <= MOST_SOURCES
    return known and why_not() is None and _unsupported(sources, ()) is None


def described(sources: Sequence[Tensor]) -> str:
    """What a read of these sources runs on, in words."""
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


def kernel_read(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    eps: float,
    gain: float,
    definition: "Definition",
    *,
    epilogue: Epilogue[Tensor] = Epilogue(),  # noqa: B008 (frozen)
    carry: Tensor | None = None,
    carry_lse: Tensor | None = None,
    threaded: bool = False,
) -> list[Tensor]:
    """The read on the kernels: out, with `delta` the new partial sum, with `threaded` the sources again.

    Tensors as in the operators. carry, carry_lse: a mixture over other sources with its log-sum-exp, which the read
    goes on from. `definition` computes the same (out and partial sum) in differentiable aten operations from query,
    key_weight, delta, norm_weight, norm_bias, carry, carry_lse and the sources.
    Source: arXiv 2603.15031, section 3.1.
    """
    from attnres_fx.ops.kernels.autograd import KernelRead, ReadOptions

    delta = epilogue.delta
    dtype = epilogue.dtype or result_dtype([*sources, *(t for t in (delta, carry) if t is not None)])
    options = ReadOptions(eps, gain, dtype, epilogue.norm, epilogue.norm_eps, delta is not None, threaded)
    beside = (query, key_weight, delta, epilogue.norm_weight, epilogue.norm_bias, carry, carry_lse)
    out, partial, *rest = KernelRead.apply(options, definition, *beside, *sources)
    return [out, *([partial] if delta is not None else []), *rest]


def kernel_batch(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    eps: float,
    definition: "Definition",
) -> list[Tensor]:
    """Phase 1 on the kernels: Q outputs, then Q log-sum-exps. `definition` computes the same from sources and weights
    (a query times its key gain, float32)."""
    from attnres_fx.ops.kernels.batch_launch import batch_of

    return batch_of(sources, queries, key_weights, eps, result_dtype(sources), definition)


def batch_usable(sources: Sequence[Tensor], *others: Tensor | None) -> bool:
    """`usable`, for phase 1, whose kernels take at most 16 sources."""
    if not kernel_device(sources[0]):
        return False
    if len(sources) > MOST_SOURCES:
        _say(f"phase 1 over {len(sources)} sources; its kernels take up to {MOST_SOURCES}")
        return False
    return usable(sources, *others)


__all__ = ["Launch", "batch_usable", "batches", "described", "kernel_batch", "kernel_read", "launch_with", "usable"]
