"""Depth attention in plain PyTorch: the definition that every kernel is held against.

    k_i = v_i * rsqrt(mean(v_i^2, -1) + eps) * key_weight
    a   = softmax_i(<query, k_i>)                 per token, over the S sources
    out = gain * sum_i a_i v_i

Sources are taken one by one and never stacked; only row statistics [S, ...] are. Arithmetic is float32,
float64 for float64 sources, with one cast at the end.

Source: arXiv 2603.15031, section 3.1.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def result_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """The dtype `+` over all sources would have."""
    return reduce(torch.promote_types, (s.dtype for s in sources))


def compute_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the arithmetic: float64 where a source is, else float32."""
    return torch.float64 if result_dtype(sources) == torch.float64 else torch.float32


def row_logit(source: Tensor, logit_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Reciprocal root mean square and logit of one source, both [..., 1], in the weight's dtype."""
    value = source.to(logit_weight.dtype)
    scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return scale, (value * logit_weight).sum(-1, keepdim=True) * scale


def depth_weights(sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The attention over depth that `depth_attention` mixes with.

    Args:
        sources: S >= 1 floating tensors [..., D] of one shape and device.
        query: [D].
        key_weight: [D].
        eps: added to the mean square of a source.

    Returns:
        [S, ...], float32 (float64 for float64 sources), summing to one over S. Nothing is checked.
    """
    dtype = compute_dtype(sources)
    logit_weight = query.to(dtype) * key_weight.to(dtype)
    logits = [row_logit(s, logit_weight, eps)[1] for s in sources]
    return torch.softmax(torch.cat(logits, -1), -1).movedim(-1, 0)


def definition(sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, eps: float, gain: float) -> Tensor:
    """Depth attention as differentiable aten operations; every transform goes through this one."""
    weights = depth_weights(sources, query, key_weight, eps=eps) * gain
    return mix(sources, weights).to(result_dtype(sources))


def mix(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of sources times weights; weights [S, ...] in the dtype to compute in."""
    rows = weights.unsqueeze(-1).unbind(0)
    mixed = sources[0].to(weights.dtype) * rows[0]
    for source, row in zip(sources[1:], rows[1:], strict=True):
        mixed = torch.addcmul(mixed, source.to(weights.dtype), row)
    return mixed


class RecomputedDepthAttention(torch.autograd.Function):
    """The definition for eager autograd: saves the sources and two numbers a row for each, nothing else.

    Float copies of half-precision sources live one at a time, in forward and again in backward.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_weight: Tensor, eps: float, gain: float, *sources: Tensor) -> Tensor:
        dtype = compute_dtype(sources)
        logit_weight = query.to(dtype) * key_weight.to(dtype)
        scales, logits = zip(*(row_logit(s, logit_weight, eps) for s in sources), strict=True)
        weights = torch.softmax(torch.cat(logits, -1), -1).movedim(-1, 0)
        ctx.save_for_backward(query, key_weight, torch.cat(scales, -1), weights, *sources)
        ctx.eps, ctx.gain = eps, gain
        mixed = sources[0].to(dtype) * (weights[0] * gain).unsqueeze(-1)
        for source, weight in zip(sources[1:], weights[1:], strict=True):
            mixed.addcmul_(source.to(dtype), (weight * gain).unsqueeze(-1))
        return mixed.to(result_dtype(sources))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key_weight, scales, weights, *sources = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition itself
            return gradients_of_definition(ctx, (query, key_weight, *sources), grad)
        dtype = weights.dtype
        logit_weight = query.to(dtype) * key_weight.to(dtype)
        grad = grad.to(dtype)
        scores = torch.stack([(grad * s.to(dtype)).sum(-1) for s in sources]) * ctx.gain
        grad_logits = weights * (scores - (weights * scores).sum(0))
        grad_logit_weight = torch.zeros_like(logit_weight)
        source_grads: list[Tensor | None] = []
        for i, source in enumerate(sources):
            value, scale = source.to(dtype), scales[..., i : i + 1]
            row = grad_logits[i].unsqueeze(-1) * scale
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                grad_logit_weight = grad_logit_weight + over_tokens(value * row)
            if not ctx.needs_input_grad[4 + i]:
                source_grads.append(None)
                continue
            product = (value * logit_weight).sum(-1, keepdim=True)
            value_factor = row * product * scale.square() / source.shape[-1]
            total = grad * (weights[i] * ctx.gain).unsqueeze(-1)
            total.addcmul_(logit_weight.expand_as(total), row).addcmul_(value, value_factor, value=-1)
            source_grads.append(total.to(source.dtype))
        grad_query = (grad_logit_weight * key_weight.to(dtype)).to(query.dtype)
        grad_key_weight = (grad_logit_weight * query.to(dtype)).to(key_weight.dtype)
        return grad_query, grad_key_weight, None, None, *source_grads


class ShapeOfDepthAttention(torch.autograd.Function):
    """The definition for tensors without data: what it returns, without the operations between.

    With free sizes every operation on such tensors is dear, so that the definition of a read takes as long to trace as
    the rest of a layer. Sources are contiguous, and so is the result.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_weight: Tensor, eps: float, gain: float, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(query, key_weight, *sources)
        ctx.eps, ctx.gain = eps, gain
        return sources[0].new_empty(sources[0].shape, dtype=result_dtype(sources))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return gradients_of_definition(ctx, ctx.saved_tensors, grad)
        query, key_weight, *sources = map(torch.empty_like, ctx.saved_tensors)
        return query, key_weight, None, None, *sources


def over_tokens(rows: Tensor) -> Tensor:
    """Sum of [..., D] over all dimensions but the last."""
    return rows.sum(tuple(range(rows.dim() - 1))) if rows.dim() > 1 else rows


def gradients_of_definition(ctx: Any, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `definition` that can be differentiated again, for an autograd function over its arguments.

    inputs: query, key_weight and the sources; ctx: holds eps and gain.
    """
    needed = [n for i, n in enumerate(ctx.needs_input_grad) if i not in (2, 3)]
    # The same tensor may stand twice in `inputs`; views keep its two gradients apart.
    query, key_weight, *sources = aliases = [t.view_as(t) for t in inputs]
    out = definition(sources, query, key_weight, ctx.eps, ctx.gain)
    wanted = [t for t, need in zip(aliases, needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    query_grad, key_grad, *rest = (next(found) if need else None for need in needed)
    return query_grad, key_grad, None, None, *rest
