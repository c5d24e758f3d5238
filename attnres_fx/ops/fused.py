"""`torch.ops.attnres_fx.depth_attention_fused`: a read with what stands before and after it.

Before it, the addition that builds the partial sum; after it, the norm that a sublayer begins with. Composite, as
`depth_attention` is: one node in export and Dynamo graphs, aten operations below autograd.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy

from attnres_fx.errors import OperatorError
from attnres_fx.ops import kernels
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

#: What `norm` says.
NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2


def depth_attention_fused(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    delta: Tensor | None = None,
    norm: int = NO_NORM,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Depth attention with the addition before it and the norm after it.

    sources, query, key_weight, eps, gain: as for `depth_attention`.
    delta: [..., D], added to the last source; the sum takes its place and is returned second, in `+`'s dtype.
    norm: 0 none, 1 RMSNorm, 2 LayerNorm of the read over its last dimension; norm_weight, norm_bias: [D] or None;
    norm_eps: added to the mean square or the variance. It is computed in float32 (float64 for float64 sources)
    from the read before it is rounded.
    dtype: of the first output, by default the one all sources promote to.
    Returns [out] or [out, partial], both [..., D].

    Raises OperatorError as `depth_attention` does, and for a delta, norm, weight, bias, norm_eps or dtype that does
    not fit. Source: arXiv 2603.15031, section 4.
    """
    if isinstance(sources, Tensor):
        raise OperatorError("depth_attention_fused: sources is one tensor; it must be a list of them, one a source.")
    sources = list(sources)
    if not any(isinstance(t, Proxy) for t in (*sources, query, key_weight, delta, norm_weight, norm_bias)):
        _check(sources, query, key_weight, eps)
        check_epilogue("depth_attention_fused", sources[-1], delta, norm, norm_weight, norm_bias, norm_eps, dtype)
    outputs: list[Tensor] = torch.ops.attnres_fx.depth_attention_fused.default(
        sources, query, key_weight, float(eps), float(gain), delta, norm, norm_weight, norm_bias, float(norm_eps), dtype
    )
    return outputs


def check_epilogue(
    name: str,
    last: Tensor,
    delta: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype | None,
) -> None:
    """Raise OperatorError where what is fused to a read does not fit its last source."""
    if delta is not None:
        if not isinstance(delta, Tensor) or not delta.is_floating_point() or delta.shape != last.shape:
            raise OperatorError(f"{name}: delta is {_kind(delta)}; it is added to the last source, {_kind(last)}.")
        _check_device(name, "delta", delta, last)
    if norm not in (NO_NORM, RMS_NORM, LAYER_NORM):
        raise OperatorError(f"{name}: norm is {norm!r}; it is 0 (none), 1 (RMSNorm) or 2 (LayerNorm).")
    for what, weight in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if weight is None:
            continue
        if norm == NO_NORM:
            raise OperatorError(f"{name}: {what} is given and norm is 0: there is no norm to take it.")
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != last.shape[-1:]:
            raise OperatorError(f"{name}: {what} is {_kind(weight)}; it must be floating point ({last.shape[-1]},).")
        _check_device(name, what, weight, last)
    if not 0 <= norm_eps < math.inf:
        raise OperatorError(f"{name}: norm_eps is {norm_eps}; it must be a finite number that is not negative.")
    if dtype is not None and not dtype.is_floating_point:
        raise OperatorError(f"{name}: dtype is {dtype}; it must be a floating dtype.")


def _check_device(name: str, what: str, tensor: Tensor, last: Tensor) -> None:
    if tensor.device != last.device:
        raise OperatorError(f"{name}: {what} is on {tensor.device} and the sources on {last.device}.")


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def normed(
    mixed: Tensor, norm: int, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """The norm of a read as aten operations, in the dtype the read is held in, cast to `dtype` at the end."""
    if norm == NO_NORM:
        return mixed.to(dtype)
    if norm == LAYER_NORM:
        mixed = mixed - mixed.mean(-1, keepdim=True)
    out = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + eps)
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
    delta: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype | None,
    threaded: bool = False,
) -> list[Tensor]:
    """The read on the kernels where they can run, else as aten operations; `threaded`, its sources again at the end."""
    _check(sources, query, key_weight, eps)
    check_epilogue(name, sources[-1], delta, norm, norm_weight, norm_bias, norm_eps, dtype)

    given = (sources, query, key_weight, eps, gain, delta, norm, norm_weight, norm_bias, norm_eps, dtype, threaded)
    if (local := read_by_tokens(functools.partial(run_fused, name), given)) is not None:
        return local

    def defined(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        query, key_weight, delta, norm_weight, norm_bias, _, _, *given = tensors
        assert query is not None and key_weight is not None
        weights = (norm_weight, norm_bias)
        present = [s for s in given if s is not None]
        return _fused_definition(present, query, key_weight, eps, gain, delta, norm, *weights, norm_eps, dtype)

    beside = (query, key_weight, delta, norm_weight, norm_bias)
    if not _is_transformed(sources) and kernels.usable(sources, *beside):
        return kernels.kernel_read(
            sources,
            query,
            key_weight,
            eps,
            gain,
            defined,
            delta=delta,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            dtype=dtype,
            threaded=threaded,
        )
    again = sources[:-1] if delta is not None else sources
    return [*defined([*beside, None, None, *sources]), *([s.view_as(s) for s in again] if threaded else [])]


def _fused_definition(
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor,
    eps: float,
    gain: float,
    delta: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    extra: list[Tensor] = []
    if delta is not None:
        extra = [sources[-1] + delta]
        sources = [*sources[:-1], *extra]
    tensors = [query, key_weight, norm_weight, norm_bias, *sources]
    held, narrow = compute_dtype(sources), result_dtype(sources)

    def definition(given: Sequence[Tensor | None]) -> list[Tensor]:
        query, key_weight, weight, bias = given[:4]
        values = [s for s in given[4:] if s is not None]
        assert query is not None and key_weight is not None
        mixed = _mix(values, depth_weights(values, query, key_weight, eps=eps) * gain)
        return [normed(mixed, norm, weight, bias, norm_eps, dtype or narrow)]

    if not _runs_in_plain_eager([t for t in tensors if t is not None]):
        if not _runs_under_a_compiler(sources):
            return [*definition(tensors), *extra]
        held_sources = [s.to(held) for s in sources]
        mixed: Tensor = TracedDepthAttention.apply(query, key_weight, eps, gain, *held_sources)
        return [normed(mixed, norm, norm_weight, norm_bias, norm_eps, dtype or narrow), *extra]
    if held == narrow or (norm == NO_NORM and dtype in (None, narrow)):
        read = DEPTH_ATTENTION(sources, query, key_weight, eps, gain)  # held as the norm wants it, nothing is rounded
        return [_normed_in_eager(read, norm, norm_weight, norm_bias, norm_eps, dtype or narrow), *extra]
    return [*recomputed(definition, tensors), *extra]


def _normed_in_eager(
    read: Tensor, norm: int, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """The norm by PyTorch's own kernels, which save the read and a statistic a row."""
    shape = read.shape[-1:]
    weight, bias = (None if t is None else t.to(read.dtype) for t in (weight, bias))
    if norm == LAYER_NORM:
        return torch.nn.functional.layer_norm(read, shape, weight, bias, eps).to(dtype)
    if norm == RMS_NORM:
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
