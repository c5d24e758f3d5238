"""`torch.ops.attnres_fx.depth_attention_fused`: a read with what stands before and after it.

Before it, the addition that builds the partial sum; after it, the norm that a sublayer begins with. Composite, as
`depth_attention` is: one node in export and Dynamo graphs, aten operations below autograd.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from attnres_fx.errors import OperatorError
from attnres_fx.ops import kernels
from attnres_fx.ops.epilogue import Epilogue, NormKind, check_epilogue
from attnres_fx.ops.inductor import TracedDepthAttention
from attnres_fx.ops.operator import (
    DEPTH_ATTENTION,
    _check,
    _is_transformed,
    _runs_in_plain_eager,
    _runs_under_a_compiler,
    library,
)
from attnres_fx.ops.recompute import recomputed
from attnres_fx.ops.reference import _mix, compute_dtype, depth_weights, result_dtype
from attnres_fx.ops.sharded import read_by_tokens

SCHEMA = (
    "depth_attention_fused(Tensor[] sources, Tensor query, Tensor key_weight, float eps, float gain, Tensor? delta, "
    "int norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, ScalarType? dtype) -> Tensor[]"
)


def depth_attention_fused(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    delta: Tensor | None = None,
    norm: int = NormKind.NONE,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Depth attention with the addition before it and the norm after it (arXiv 2603.15031, section 4).

    Args:
        sources: as for `depth_attention`, [..., D] each.
        query: [D].
        key_weight: [D].
        eps: as for `depth_attention`.
        gain: as for `depth_attention`.
        delta: [..., D], added to the last source; the sum takes its place and is returned second, in `+`'s dtype.
        norm: the norm of the read over its last dimension: 0 none, 1 RMSNorm, 2 LayerNorm. It is computed in float32
            (float64 for float64 sources) from the read before it is rounded.
        norm_weight: [D] or None.
        norm_bias: [D] or None.
        norm_eps: added to the mean square or the variance.
        dtype: of the first output, by default the one all sources promote to.

    Returns:
        `[out]` or, with a delta, `[out, partial]`, both [..., D].

    Raises:
        OperatorError: as `depth_attention` does, and for a delta, norm, weight, bias, norm_eps or dtype that does not
            fit.
    """
    if isinstance(sources, Tensor):
        raise OperatorError("depth_attention_fused: sources is one tensor; it must be a list of them, one a source.")
    sources = list(sources)
    epilogue = Epilogue(delta, norm, norm_weight, norm_bias, norm_eps, dtype)
    if not any(isinstance(t, Proxy) for t in (*sources, query, key_weight, delta, norm_weight, norm_bias)):
        _check(sources, query, key_weight, eps)
        check_epilogue("depth_attention_fused", sources[-1], epilogue)
    outputs: list[Tensor] = torch.ops.attnres_fx.depth_attention_fused.default(
        sources, query, key_weight, float(eps), float(gain), *epilogue.to_arguments()
    )
    return outputs


def normed(mixed: Tensor, epilogue: Epilogue[Tensor], dtype: torch.dtype) -> Tensor:
    """The norm of a read as aten operations, in the dtype the read is held in, cast to `dtype` at the end."""
    weight, bias = epilogue.norm_weight, epilogue.norm_bias
    if epilogue.norm == NormKind.NONE:
        return mixed.to(dtype)
    if epilogue.norm == NormKind.LAYER:
        mixed = mixed - mixed.mean(-1, keepdim=True)
    out = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + epilogue.norm_eps)
    if weight is not None:
        out = out * weight.to(mixed.dtype)
    if bias is not None:
        out = out + bias.to(mixed.dtype)
    return out.to(dtype)


def run_fused(
    name: str,
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor,
    eps: float,
    gain: float,
    *arguments: Any,
    threaded: bool = False,
) -> list[Tensor]:
    """The read on the kernels where they can run, else as aten operations; `threaded`, its sources again at the end.

    arguments: an `Epilogue`, as the registered operators take it.
    """
    epilogue: Epilogue[Tensor] = Epilogue.from_arguments(*arguments)
    _check(sources, query, key_weight, eps)
    check_epilogue(name, sources[-1], epilogue)

    read = functools.partial(run_fused, name, threaded=threaded)
    if (local := read_by_tokens(read, (sources, query, key_weight, eps, gain, *arguments))) is not None:
        return local

    def defined(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        query, key_weight, delta, norm_weight, norm_bias, _, _, *rest = tensors
        assert query is not None and key_weight is not None
        around = replace(epilogue, delta=delta, norm_weight=norm_weight, norm_bias=norm_bias)
        return _fused_definition([s for s in rest if s is not None], query, key_weight, eps, gain, around)

    beside = (query, key_weight, epilogue.delta, epilogue.norm_weight, epilogue.norm_bias)
    if not _is_transformed(sources) and kernels.usable(sources, *beside):
        return kernels.kernel_read(sources, query, key_weight, eps, gain, defined, epilogue=epilogue, threaded=threaded)
    again = sources[:-1] if epilogue.delta is not None else sources
    return [*defined([*beside, None, None, *sources]), *([s.view_as(s) for s in again] if threaded else [])]


def _fused_definition(
    sources: list[Tensor], query: Tensor, key_weight: Tensor, eps: float, gain: float, epilogue: Epilogue[Tensor]
) -> list[Tensor]:
    extra: list[Tensor] = []
    if epilogue.delta is not None:
        extra = [sources[-1] + epilogue.delta]
        sources = [*sources[:-1], *extra]
    tensors = [query, key_weight, epilogue.norm_weight, epilogue.norm_bias, *sources]
    held, narrow = compute_dtype(sources), result_dtype(sources)
    dtype = epilogue.dtype or narrow

    def definition(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        query, key_weight, weight, bias, *rest = tensors
        values = [s for s in rest if s is not None]
        assert query is not None and key_weight is not None
        mixed = _mix(values, depth_weights(values, query, key_weight, eps=eps) * gain)
        return [normed(mixed, replace(epilogue, norm_weight=weight, norm_bias=bias), dtype)]

    if not _runs_in_plain_eager([t for t in tensors if t is not None]):
        if not _runs_under_a_compiler(sources):
            return [*definition(tensors), *extra]
        held_sources = [s.to(held) for s in sources]
        mixed: Tensor = TracedDepthAttention.apply(query, key_weight, eps, gain, *held_sources)
        return [normed(mixed, epilogue, dtype), *extra]
    if held == narrow or (epilogue.norm == NormKind.NONE and dtype == narrow):
        read = DEPTH_ATTENTION(sources, query, key_weight, eps, gain)  # held as the norm wants it, nothing is rounded
        return [_normed_in_eager(read, epilogue, dtype), *extra]
    return [*recomputed(definition, tensors), *extra]


def _normed_in_eager(read: Tensor, epilogue: Epilogue[Tensor], dtype: torch.dtype) -> Tensor:
    """The norm by PyTorch's own kernels, which save the read and a statistic a row."""
    shape, eps = read.shape[-1:], epilogue.norm_eps
    weight, bias = (None if t is None else t.to(read.dtype) for t in (epilogue.norm_weight, epilogue.norm_bias))
    if epilogue.norm == NormKind.LAYER:
        return torch.nn.functional.layer_norm(read, shape, weight, bias, eps).to(dtype)
    if epilogue.norm == NormKind.RMS:
        out = torch.nn.functional.rms_norm(read, shape, weight, eps)
        return (out if bias is None else out + bias).to(dtype)
    return read.to(dtype)


_fused = functools.partial(run_fused, "depth_attention_fused")
library.define(SCHEMA)
library.impl("depth_attention_fused", _fused, "CompositeImplicitAutograd")
# As for depth_attention: without it vmap meets the composite kernel above its batching rules.
library.impl("depth_attention_fused", _fused, "FuncTorchBatched")

#: What stands in a graph, with all eleven arguments by position.
DEPTH_ATTENTION_FUSED = torch.ops.attnres_fx.depth_attention_fused.default
