"""`torch.ops.attnres_fx.depth_attention`: depth attention as one node in every graph.

It is composite: whatever looks below autograd (Inductor, vmap, forward mode, functionalization) meets
the aten operations of the definition, while `torch.export` and Dynamo keep the single node that passes
look for.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx import Proxy

from attnres_fx.errors import OperatorError
from attnres_fx.ops import kernels
from attnres_fx.ops.inductor import TracedDepthAttention
from attnres_fx.ops.recompute import Definition
from attnres_fx.ops.reference import RecomputedDepthAttention, definition
from attnres_fx.ops.sharded import read_by_tokens

SCHEMA = "depth_attention(Tensor[] sources, Tensor query, Tensor key_weight, float eps, float gain) -> Tensor"

library = torch.library.Library("attnres_fx", "FRAGMENT")
library.define(SCHEMA)


def depth_attention(
    sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, *, eps: float = 1e-6, gain: float = 1.0
) -> Tensor:
    """Softmax mixture of `sources` over depth, one weight per token and source.

    sources: S >= 1 floating tensors [..., D] of one shape and device; dtypes are promoted as `+` would.
    query, key_weight: [D]. Only their product enters the logits.
    eps: added to the mean square of a source; gain: multiplies the mixture.
    Returns [..., D] in the promoted dtype; arithmetic is float32, float64 for float64 sources. With one
    source the result is exactly `gain * source` and the query's gradient exactly zero.

    Raises OperatorError for an empty list, what is no tensor, integer sources, sources that differ in
    shape or device, a query or key_weight that is not [D], and an eps that is negative or not finite.
    Source: arXiv 2603.15031, section 3.1.
    """
    if isinstance(sources, Tensor):
        raise OperatorError("depth_attention: sources is one tensor; it must be a list of them, one a source.")
    sources = list(sources)
    if not any(isinstance(t, Proxy) for t in (*sources, query, key_weight)):
        _check(sources, query, key_weight, eps)
    mixed: Tensor = torch.ops.attnres_fx.depth_attention.default(sources, query, key_weight, float(eps), float(gain))
    return mixed


def _check(sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, eps: float) -> None:
    if not sources:
        raise OperatorError("depth_attention got an empty list of sources: it needs at least one.")
    if not 0 <= eps < math.inf:
        raise OperatorError(f"depth_attention: eps is {eps}; it must be a finite number that is not negative.")
    named = {**{f"source {i}": s for i, s in enumerate(sources)}, "query": query, "key_weight": key_weight}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise OperatorError(f"depth_attention: {name} is a {type(value).__name__}; it must be a tensor.")
    first = sources[0]
    for i, source in enumerate(sources):
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
    for name, weight in (("query", query), ("key_weight", key_weight)):
        if not weight.is_floating_point() or weight.dim() != 1 or weight.shape[0] != first.shape[-1]:
            raise OperatorError(
                f"depth_attention: {name} is {weight.dtype} {tuple(weight.shape)}; "
                f"for sources {tuple(first.shape)} it must be floating point ({first.shape[-1]},)."
            )
        if weight.device != first.device:
            raise OperatorError(
                f"depth_attention: {name} is on {weight.device} and the sources on {first.device}: "
                f"move the model with its attnres parameters."
            )


def _depth_attention(sources: list[Tensor], query: Tensor, key_weight: Tensor, eps: float, gain: float) -> Tensor:
    _check(sources, query, key_weight, eps)
    if (local := read_by_tokens(_read_rows, (sources, query, key_weight, eps, gain))) is not None:
        return local[0]
    if not _is_transformed(sources) and kernels.usable(sources, query, key_weight):
        (read,) = kernels.kernel_read(sources, query, key_weight, eps, gain, _again(eps, gain))
        return read
    if _runs_in_plain_eager(sources):
        mixed: Tensor = RecomputedDepthAttention.apply(query, key_weight, eps, gain, *sources)
        return mixed
    if _runs_under_a_compiler(sources):
        traced: Tensor = TracedDepthAttention.apply(query, key_weight, eps, gain, *sources)
        return traced
    return definition(sources, query, key_weight, eps, gain)


def _read_rows(*args: Any) -> list[Tensor]:
    return [_depth_attention(*args)]


def _again(eps: float, gain: float) -> Definition:
    def again(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        query, key_weight, _, _, _, _, _, *sources = tensors
        assert query is not None and key_weight is not None
        return [definition([s for s in sources if s is not None], query, key_weight, eps, gain)]

    return again


def _is_transformed(sources: Sequence[Tensor]) -> bool:
    """Whether a transform of `torch.func`, forward mode or another library's tensors must see the definition."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(not isinstance(s, FakeTensor | FunctionalTensor) and type(s) not in _PLAIN for s in sources)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _runs_in_plain_eager(sources: Sequence[Tensor]) -> bool:
    """Whether no tracer and no transform is looking, so that saving only row statistics is ours to do.

    Modes that merely watch (FLOP counters, selective checkpointing) are neither.
    """
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)
        or any(type(s) is not Tensor and type(s) is not torch.nn.Parameter for s in sources)
    )


def _runs_under_a_compiler(sources: Sequence[Tensor]) -> bool:
    """Whether AOTAutograd traces this, for the CPU and under no transform, so that backward may be ours too."""
    return (
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and all(type(s) is FunctionalTensor and s.device.type == "cpu" for s in sources)
    )


_TRACING_MODES = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)

library.impl("depth_attention", _depth_attention, "CompositeImplicitAutograd")
# Without this second registration vmap meets the composite kernel above its batching rules and fails.
library.impl("depth_attention", _depth_attention, "FuncTorchBatched")

#: What stands in a graph: `DEPTH_ATTENTION(sources, query, key_weight, eps, gain)`.
DEPTH_ATTENTION = torch.ops.attnres_fx.depth_attention.default
