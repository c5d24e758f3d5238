"""`torch.ops.attnres_fx.depth_attention`: depth attention as one node in every graph.

It is composite: whatever looks below autograd (Inductor, vmap, forward mode, functionalization) meets
the aten operations of the definition, while `torch.export` and Dynamo keep the single node that passes
look for.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import is_contiguous_or_false
from torch.fx import Proxy

from attnres_fx.errors import OperatorError
from attnres_fx.ops import kernels
from attnres_fx.ops.dispatch import (
    has_no_data,
    is_transformed,
    runs_in_plain_eager,
    runs_under_a_compiler,
)
from attnres_fx.ops.inductor import TracedDepthAttention
from attnres_fx.ops.read_style import ReadStyle, check_style
from attnres_fx.ops.read_tensors import ReadOptions, ReadTensors, read_of
from attnres_fx.ops.reference import RecomputedDepthAttention, ShapeOfDepthAttention, definition
from attnres_fx.ops.sharded import read_by_tokens

#: What every operator takes last, the fields of a `ReadStyle`.
STYLE_ARGUMENTS = "Tensor? bias=None, float scale=1.0, bool value_norm=False"
SCHEMA = (
    "depth_attention(Tensor[] sources, Tensor query, Tensor? key_weight, float eps, float gain, "
    f"{STYLE_ARGUMENTS}) -> Tensor"
)

library = torch.library.Library("attnres_fx", "FRAGMENT")
library.define(SCHEMA)


def depth_attention(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    value_norm: bool = False,
) -> Tensor:
    """Softmax mixture of `sources` over depth, one weight per token and source (arXiv 2603.15031, section 3.1).

    Args:
        sources: S >= 1 floating tensors [..., D] of one shape and device; dtypes are promoted as `+` would.
        query: [D], floating point. Only its product with key_weight enters the logits.
        key_weight: [D], floating point, or None for keys without a gain.
        eps: added to the mean square of a source.
        gain: multiplies the mixture.
        bias: [S], floating point, added to the logits, one number a source.
        scale: multiplies the products of query and keys.
        value_norm: whether sources are divided by their root mean square when they are mixed too, as keys are (the key
            gain is for keys alone).

    Returns:
        [..., D] in the promoted dtype; arithmetic is float32, float64 for float64 sources. With one source the result
        is exactly `gain * source` (of a normalised value where asked for) and the query's gradient exactly zero.

    Raises:
        OperatorError: the list is empty, holds what is no tensor, integer sources, or sources that differ in shape or
            device; query or key_weight is not [D], or bias not [S]; eps is negative or not finite, or scale not finite.
    """
    if isinstance(sources, Tensor):
        raise OperatorError("depth_attention: sources is one tensor; it must be a list of them, one a source.")
    sources = list(sources)
    style = ReadStyle(bias, scale, value_norm)
    if not any(isinstance(t, Proxy) for t in (*sources, query, key_weight, bias)):
        check_read(sources, query, key_weight, eps)
        check_style("depth_attention", sources, style)
    mixed: Tensor = torch.ops.attnres_fx.depth_attention.default(
        sources, query, key_weight, float(eps), float(gain), *style.to_arguments()
    )
    return mixed


def check_read(sources: Sequence[Tensor], query: Tensor, key_weight: Tensor | None, eps: float) -> None:
    """Raise OperatorError where a read cannot be computed from these; the message names what does not fit."""
    check_sources(sources, eps)
    weights = {"query": query} if key_weight is None else {"query": query, "key_weight": key_weight}
    for name, weight in weights.items():
        _require_tensor(name, weight)
    for name, weight in weights.items():
        _check_weight(name, weight, sources[0])


def check_sources(sources: Sequence[Tensor], eps: float) -> None:
    """Raise OperatorError for sources that no read takes, and for such an eps."""
    if not sources:
        raise OperatorError("depth_attention got an empty list of sources: it needs at least one.")
    if not 0 <= eps < math.inf:
        raise OperatorError(f"depth_attention: eps is {eps}; it must be a finite number that is not negative.")
    for i, source in enumerate(sources):
        _require_tensor(f"source {i}", source)
    for i, source in enumerate(sources):
        _check_source(i, source, sources[0])


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise OperatorError(f"depth_attention: {name} is a {type(value).__name__}; it must be a tensor.")


def _check_source(i: int, source: Tensor, first: Tensor) -> None:
    if not source.is_floating_point():
        raise OperatorError(f"depth_attention: source {i} is {source.dtype}; sources must be floating point.")
    if source.dim() < 1:
        raise OperatorError(f"depth_attention: source {i} has no dimensions; sources are [..., D].")
    if source.shape != first.shape:
        raise OperatorError(
            f"depth_attention: source {i} has shape {tuple(source.shape)} and source 0 "
            f"{tuple(first.shape)}: all sources of a read have one shape."
        )
    if source.device != first.device:
        raise OperatorError(
            f"depth_attention: source {i} is on {source.device} and source 0 on {first.device}: "
            f"move the sources to one device."
        )


def _check_weight(name: str, weight: Tensor, source: Tensor) -> None:
    if not weight.is_floating_point() or weight.dim() != 1 or weight.shape[0] != source.shape[-1]:
        raise OperatorError(
            f"depth_attention: {name} is {weight.dtype} {tuple(weight.shape)}; "
            f"for sources {tuple(source.shape)} it must be floating point ({source.shape[-1]},)."
        )
    check_device(name, weight, source)


def check_device(name: str, weight: Tensor, source: Tensor) -> None:
    """Raise OperatorError for a weight that is elsewhere than the sources."""
    if weight.device != source.device:
        raise OperatorError(
            f"depth_attention: {name} is on {weight.device} and the sources on {source.device}: "
            f"move the model with its attnres parameters."
        )


def _depth_attention(
    sources: list[Tensor], query: Tensor, key_weight: Tensor | None, eps: float, gain: float, *arguments: Any
) -> Tensor:
    style: ReadStyle[Tensor] = ReadStyle.from_arguments(*arguments)
    check_read(sources, query, key_weight, eps)
    check_style("depth_attention", sources, style)
    (read,) = _run(*read_of(sources, query, key_weight, eps, gain, style=style))
    return read


def _run(tensors: ReadTensors[Tensor], options: ReadOptions) -> list[Tensor]:
    if (local := read_by_tokens(functools.partial(_run, options=options), tensors)) is not None:
        return local
    sources, flat = tensors.sources, tensors.to_flat()
    if has_no_data(tensors.present()) and all(map(is_contiguous_or_false, sources)):
        return [ShapeOfDepthAttention.apply(options, *flat)]
    if not is_transformed(sources) and kernels.takes(tensors):
        return kernels.kernel_read(tensors, options, _read_definition)
    if runs_in_plain_eager(sources):
        return [RecomputedDepthAttention.apply(options, *flat)]
    if runs_under_a_compiler(sources):
        return [TracedDepthAttention.apply(options, *flat)]
    return _read_definition(tensors, options)


def _read_definition(tensors: ReadTensors[Tensor], options: ReadOptions) -> list[Tensor]:
    return [definition(tensors, options)]


library.impl("depth_attention", _depth_attention, "CompositeImplicitAutograd")
# Without this second registration vmap meets the composite kernel above its batching rules and fails.
library.impl("depth_attention", _depth_attention, "FuncTorchBatched")

#: What stands in a graph: `DEPTH_ATTENTION(list(sources), query, key_weight, eps, gain)`, and a `ReadStyle` behind.
DEPTH_ATTENTION = torch.ops.attnres_fx.depth_attention.default
