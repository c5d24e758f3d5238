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
from attnres_fx.ops.dispatch import is_transformed, runs_in_plain_eager, runs_under_a_compiler
from attnres_fx.ops.dtypes import compute_dtype, result_dtype
from attnres_fx.ops.epilogue import FUSED_FIELDS, Epilogue, NormKind, check_epilogue
from attnres_fx.ops.inductor import TracedDepthAttention
from attnres_fx.ops.operator import STYLE_ARGUMENTS, check_read, library
from attnres_fx.ops.read_style import ReadStyle, check_style
from attnres_fx.ops.read_tensors import ReadOptions, ReadTensors, read_of, sources_as_views, with_delta_added
from attnres_fx.ops.recompute import recomputed
from attnres_fx.ops.reference import RecomputedDepthAttention, mixture
from attnres_fx.ops.sharded import read_by_tokens

#: The arguments of a read with what is fused to it.
FUSED_ARGUMENTS = (
    "Tensor[] sources, Tensor query, Tensor? key_weight, float eps, float gain, Tensor? delta, int norm, "
    f"Tensor? norm_weight, Tensor? norm_bias, float norm_eps, ScalarType? dtype, {STYLE_ARGUMENTS}"
)


def depth_attention_fused(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    delta: Tensor | None = None,
    norm: int = NormKind.NONE,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    value_norm: bool = False,
) -> list[Tensor]:
    """Depth attention with the addition before it and the norm after it (arXiv 2603.15031, section 4).

    Args:
        sources: as for `depth_attention`, [..., D] each.
        query: [D].
        key_weight: [D] or None.
        eps: as for `depth_attention`.
        gain: as for `depth_attention`.
        delta: [..., D], added to the last source; the sum takes its place and is returned second, in `+`'s dtype.
        norm: the norm of the read over its last dimension: 0 none, 1 RMSNorm, 2 LayerNorm. It is computed in float32
            (float64 for float64 sources) from the read before it is rounded.
        norm_weight: [D] or None.
        norm_bias: [D] or None.
        norm_eps: added to the mean square or the variance.
        dtype: of the first output, by default the one all sources promote to.
        bias: as for `depth_attention`, and so are scale and value_norm.
        scale: as for `depth_attention`.
        value_norm: as for `depth_attention`.

    Returns:
        `[out]` or, with a delta, `[out, partial]`, both [..., D].

    Raises:
        OperatorError: as `depth_attention` does, and for a delta, norm, weight, bias, norm_eps or dtype that does not
            fit.
    """
    if isinstance(sources, Tensor):
        raise OperatorError("depth_attention_fused: sources is one tensor; it must be a list of them, one a source.")
    sources = list(sources)
    epilogue, style = Epilogue(delta, norm, norm_weight, norm_bias, norm_eps, dtype), ReadStyle(bias, scale, value_norm)
    if not any(isinstance(t, Proxy) for t in (*sources, query, key_weight, delta, norm_weight, norm_bias, bias)):
        check_read(sources, query, key_weight, eps)
        check_epilogue("depth_attention_fused", sources[-1], epilogue)
        check_style("depth_attention_fused", sources, style)
    outputs: list[Tensor] = torch.ops.attnres_fx.depth_attention_fused.default(
        sources, query, key_weight, float(eps), float(gain), *epilogue.to_arguments(), *style.to_arguments()
    )
    return outputs


def run_fused(
    name: str,
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    eps: float,
    gain: float,
    *arguments: Any,
    returns_sources: bool = False,
) -> list[Tensor]:
    """The registered operators with an epilogue.

    Args:
        name: of the operator, for errors.
        sources: as for `depth_attention_fused`, and so are query, key_weight, eps and gain.
        arguments: an `Epilogue` and a `ReadStyle`, as the registered operators take them.
        returns_sources: whether the sources that no delta changes are returned too, as views of themselves.

    Returns:
        The read, with a delta the new last source, and the sources where they are asked for.

    Raises:
        OperatorError: an argument does not fit.
    """
    epilogue: Epilogue[Tensor] = Epilogue.from_arguments(*arguments[:FUSED_FIELDS])
    style: ReadStyle[Tensor] = ReadStyle.from_arguments(*arguments[FUSED_FIELDS:])
    check_read(sources, query, key_weight, eps)
    check_epilogue(name, sources[-1], epilogue)
    check_style(name, sources, style)
    return _run(*read_of(sources, query, key_weight, eps, gain, epilogue, style, returns_sources=returns_sources))


def _run(tensors: ReadTensors[Tensor], options: ReadOptions) -> list[Tensor]:
    """The read on the kernels where they can run, else as aten operations."""
    if (local := read_by_tokens(functools.partial(_run, options=options), tensors)) is not None:
        return local
    if not is_transformed(tensors.sources) and kernels.takes(tensors):
        return kernels.kernel_read(tensors, options, _fused_definition)
    return _fused_definition(tensors, options)


def _fused_definition(tensors: ReadTensors[Tensor], options: ReadOptions) -> list[Tensor]:
    summed = with_delta_added(tensors)
    partial = [summed.sources[-1]] if tensors.delta is not None else []
    return [_normed_read(summed, options), *partial, *sources_as_views(tensors, options)]


def _normed_read(tensors: ReadTensors[Tensor], options: ReadOptions) -> Tensor:
    """The read and its norm, without a delta, by what suits who looks at it."""
    sources, flat = tensors.sources, tensors.to_flat()
    held, narrow = compute_dtype(sources), result_dtype(sources)
    dtype = options.dtype or narrow
    if not runs_in_plain_eager(tensors.present()):
        if not runs_under_a_compiler(sources):
            return _normed_read_definition(tensors, options)
        as_held = replace(tensors, sources=tuple(s.to(held) for s in sources))
        mixed: Tensor = TracedDepthAttention.apply(options, *as_held.to_flat())
        return normed(mixed, tensors, options, dtype)
    if held == narrow or (options.norm == NormKind.NONE and dtype == narrow):
        # Held as the norm wants it, nothing is rounded.
        read = RecomputedDepthAttention.apply(options, *flat)
        return _normed_in_eager(read, tensors, options, dtype)

    def again(flat: Sequence[Tensor | None]) -> list[Tensor]:
        return [_normed_read_definition(ReadTensors.from_flat(flat), options)]

    (read,) = recomputed(again, flat)
    return read


def _normed_read_definition(tensors: ReadTensors[Tensor], options: ReadOptions) -> Tensor:
    return normed(mixture(tensors, options), tensors, options, options.dtype or result_dtype(tensors.sources))


def normed(mixed: Tensor, tensors: ReadTensors[Tensor], options: ReadOptions, dtype: torch.dtype) -> Tensor:
    """The norm after a read as differentiable aten operations.

    Args:
        mixed: [..., D], the read, float32 or float64.
        tensors: those of the read; norm_weight and norm_bias are taken.
        options: those of the read; norm and norm_eps are taken.
        dtype: of the result.

    Returns:
        [..., D], computed in the dtype of `mixed` and cast at the end.
    """
    if options.norm == NormKind.NONE:
        return mixed.to(dtype)
    if options.norm == NormKind.LAYER:
        mixed = mixed - mixed.mean(-1, keepdim=True)
    out = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + options.norm_eps)
    if tensors.norm_weight is not None:
        out = out * tensors.norm_weight.to(mixed.dtype)
    if tensors.norm_bias is not None:
        out = out + tensors.norm_bias.to(mixed.dtype)
    return out.to(dtype)


def _normed_in_eager(read: Tensor, tensors: ReadTensors[Tensor], options: ReadOptions, dtype: torch.dtype) -> Tensor:
    """The norm by PyTorch's own kernels, which save the read and a statistic a row."""
    shape, eps = read.shape[-1:], options.norm_eps
    weight, bias = (None if t is None else t.to(read.dtype) for t in (tensors.norm_weight, tensors.norm_bias))
    if options.norm == NormKind.LAYER:
        return torch.nn.functional.layer_norm(read, shape, weight, bias, eps).to(dtype)
    if options.norm == NormKind.RMS:
        out = torch.nn.functional.rms_norm(read, shape, weight, eps)
        return (out if bias is None else out + bias).to(dtype)
    return read.to(dtype)


_fused = functools.partial(run_fused, "depth_attention_fused")
library.define(f"depth_attention_fused({FUSED_ARGUMENTS}) -> Tensor[]")
library.impl("depth_attention_fused", _fused, "CompositeImplicitAutograd")
# As for depth_attention: without it vmap meets the composite kernel above its batching rules.
library.impl("depth_attention_fused", _fused, "FuncTorchBatched")

#: What stands in a graph, with all arguments by position; a `ReadStyle` last, where there is one.
DEPTH_ATTENTION_FUSED = torch.ops.attnres_fx.depth_attention_fused.default
