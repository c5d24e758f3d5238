"""Depth attention in plain PyTorch: the definition that every kernel is held against.

    r_i = rsqrt(mean(v_i^2, -1) + eps)
    k_i = v_i * r_i * key_weight
    a   = softmax_i(scale * <query, k_i> + bias_i)    per token, over the S sources
    out = gain * sum_i a_i v_i                        with value_norm: gain * sum_i a_i r_i v_i

Sources are taken one by one and never stacked; only row statistics [S, ...] are. Arithmetic is float32,
float64 for float64 sources, with one cast at the end.

Source: arXiv 2603.15031, section 3.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.dtypes import compute_dtype, result_dtype
from attnres_fx.ops.read_tensors import ReadOptions, ReadTensors
from attnres_fx.ops.recompute import gradients_again


def row_logit(source: Tensor, logit_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Reciprocal root mean square and logit of one source, both [..., 1], in the weight's dtype."""
    value = source.to(logit_weight.dtype)
    scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return scale, (value * logit_weight).sum(-1, keepdim=True) * scale


def row_logits(
    sources: Sequence[Tensor], logit_weight: Tensor, eps: float, bias: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Reciprocal root mean squares, S of [..., 1], and logits [..., S] with the bias [S] in them."""
    pairs = [row_logit(s, logit_weight, eps) for s in sources]
    logits = torch.cat([logit for _, logit in pairs], -1)
    return [scale for scale, _ in pairs], logits if bias is None else logits + bias.to(logits.dtype)


def definition(tensors: ReadTensors[Tensor], options: ReadOptions) -> Tensor:
    """Depth attention as differentiable aten operations; every transform goes through this one."""
    return mixture(tensors, options).to(result_dtype(tensors.sources))


def mixture(tensors: ReadTensors[Tensor], options: ReadOptions) -> Tensor:
    """What `definition` returns, before it is rounded."""
    dtype = compute_dtype(tensors.sources)
    logit_weight = tensors.query.to(dtype) * tensors.key_weight.to(dtype)
    scales, logits = row_logits(tensors.sources, logit_weight, options.eps, tensors.bias)
    factors = torch.softmax(logits, -1).movedim(-1, 0) * options.gain
    return mix(tensors.sources, times_scales(factors, scales, options))


def times_scales(factors: Tensor, scales: Sequence[Tensor], options: ReadOptions) -> Tensor:
    """What sources are multiplied by, [S, ...], from the factors of their values and S scales [..., 1]."""
    return factors * torch.cat(list(scales), -1).movedim(-1, 0) if options.value_norm else factors


def mix(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of sources times weights; weights [S, ...] in the dtype to compute in."""
    rows = weights.unsqueeze(-1).unbind(0)
    mixed = sources[0].to(weights.dtype) * rows[0]
    for source, row in zip(sources[1:], rows[1:], strict=True):
        mixed = torch.addcmul(mixed, source.to(weights.dtype), row)
    return mixed


class RecomputedDepthAttention(torch.autograd.Function):
    """The definition for eager autograd: saves the sources and two numbers a row for each, nothing else.

    Float copies of half-precision sources live one at a time, in forward and again in backward. Takes the options of
    the read, and its tensors as `ReadTensors.to_flat` has them.
    """

    @staticmethod
    def forward(ctx: Any, options: ReadOptions, *flat: Tensor | None) -> Tensor:
        tensors: ReadTensors[Tensor] = ReadTensors.from_flat(flat)
        sources, dtype = tensors.sources, compute_dtype(tensors.sources)
        logit_weight = tensors.query.to(dtype) * tensors.key_weight.to(dtype)
        scales, logits = row_logits(sources, logit_weight, options.eps, tensors.bias)
        weights = torch.softmax(logits, -1).movedim(-1, 0)
        ctx.save_for_backward(torch.cat(scales, -1), weights, *flat)
        ctx.options = options
        factors = times_scales(weights * options.gain, scales, options)
        mixed = sources[0].to(dtype) * factors[0].unsqueeze(-1)
        for source, factor in zip(sources[1:], factors[1:], strict=True):
            mixed.addcmul_(source.to(dtype), factor.unsqueeze(-1))
        return mixed.to(result_dtype(sources))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        scales, weights, *flat = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition itself
            return gradients_of_definition(ctx, flat, grad)
        tensors: ReadTensors[Tensor] = ReadTensors.from_flat(flat)
        needs: ReadTensors[bool] = ReadTensors.from_flat(ctx.needs_input_grad[1:])
        return None, *_gradients(tensors, ctx.options, (scales, weights), grad, needs).to_flat()


def _gradients(
    tensors: ReadTensors[Tensor],
    options: ReadOptions,
    statistics: tuple[Tensor, Tensor],
    grad: Tensor,
    needs: ReadTensors[bool],
) -> ReadTensors[Tensor | None]:
    """Gradients of a read from its scales [..., S], its weights [S, ...] and the gradient of its result."""
    scales, weights = statistics
    dtype, width = weights.dtype, tensors.sources[0].shape[-1]
    by_source, grad = scales.movedim(-1, 0).unsqueeze(-1), grad.to(dtype)
    logit_weight = tensors.query.to(dtype) * tensors.key_weight.to(dtype)
    scores = torch.stack([(grad * s.to(dtype)).sum(-1) for s in tensors.sources]) * options.gain
    scores = scores * by_source.squeeze(-1) if options.value_norm else scores
    grad_logits = weights * (scores - (weights * scores).sum(0))
    grad_logit_weight = torch.zeros_like(logit_weight)
    source_grads: list[Tensor | None] = []
    for i, source in enumerate(tensors.sources):
        value, scale = source.to(dtype), by_source[i]
        row, factor = grad_logits[i].unsqueeze(-1) * scale, (weights[i] * options.gain).unsqueeze(-1)
        if needs.query or needs.key_weight:
            grad_logit_weight = grad_logit_weight + over_tokens(value * row)
        if not needs.sources[i]:
            source_grads.append(None)
            continue
        along = row * (value * logit_weight).sum(-1, keepdim=True)
        if options.value_norm:  # the scale is in the value too
            factor, along = factor * scale, along + (weights[i] * scores[i]).unsqueeze(-1)
        total = grad * factor
        total.addcmul_(logit_weight.expand_as(total), row)
        total.addcmul_(value, along * scale.square() / width, value=-1)
        source_grads.append(total.to(source.dtype))
    bias = tensors.bias
    return ReadTensors[Tensor | None](
        tuple(source_grads),
        (grad_logit_weight * tensors.key_weight.to(dtype)).to(tensors.query.dtype),
        (grad_logit_weight * tensors.query.to(dtype)).to(tensors.key_weight.dtype),
        bias=None if bias is None else grad_logits.flatten(1).sum(1).to(bias.dtype),
    )


class ShapeOfDepthAttention(torch.autograd.Function):
    """The definition for tensors without data: what it returns, without the operations between.

    With free sizes every operation on such tensors is dear, so that the definition of a read takes as long to trace as
    the rest of a layer. Sources are contiguous, and so is the result.
    """

    @staticmethod
    def forward(ctx: Any, options: ReadOptions, *flat: Tensor | None) -> Tensor:
        sources: tuple[Tensor, ...] = ReadTensors.from_flat(flat).sources
        ctx.save_for_backward(*flat)
        ctx.options = options
        return sources[0].new_empty(sources[0].shape, dtype=result_dtype(sources))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return gradients_of_definition(ctx, ctx.saved_tensors, grad)
        return None, *(None if t is None else torch.empty_like(t) for t in ctx.saved_tensors)


def over_tokens(rows: Tensor) -> Tensor:
    """Sum of [..., D] over all dimensions but the last."""
    return rows.sum(tuple(range(rows.dim() - 1))) if rows.dim() > 1 else rows


def gradients_of_definition(ctx: Any, flat: Sequence[Tensor | None], grad: Tensor) -> tuple[Any, ...]:
    """Gradients of `definition` that can be differentiated again, for an autograd function over its arguments.

    flat: the tensors of the read; ctx: holds its options.
    """

    def again(given: Sequence[Tensor | None]) -> list[Tensor]:
        return [definition(ReadTensors.from_flat(given), ctx.options)]

    return None, *gradients_again(again, flat, ctx.needs_input_grad[1:], [grad])
