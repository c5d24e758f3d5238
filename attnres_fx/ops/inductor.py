"""Depth attention for Inductor's C++ code generator: as few loops over the sources as it can make of it.

The numbers are those of `definition`; what differs is how they are grouped. Inductor puts what shares its
iteration space into one loop, so every row statistic is one entry of a [..., S] tensor (a tensor of its own
for each source would be a loop for each), the backward pass is written out, and what the query's gradient
sums over tokens is first summed over the sources, which turns S walks down the columns into one.

    forward   all row sums in one loop, the mixture in another
    backward  all <grad, v_i> in one loop; every gradient, and sum_i row_i v_i for the query's, in another
"""

from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.reference import compute_dtype, gradients_of_definition, over_tokens, result_dtype


class TracedDepthAttention(torch.autograd.Function):
    """The definition for AOTAutograd to trace: saves the inputs and 3 S + 1 numbers a row, nothing else."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_weight: Tensor, eps: float, gain: float, *sources: Tensor) -> Tensor:
        dtype, count, width = compute_dtype(sources), len(sources), sources[0].shape[-1]
        logit_weight = query.to(dtype) * key_weight.to(dtype)
        values = [s.to(dtype) for s in sources]
        sums = [v.square().sum(-1, keepdim=True) for v in values]
        sums += [(v * logit_weight).sum(-1, keepdim=True) for v in values]
        row_sums = torch.cat(sums, -1)
        logits = row_sums[..., count:] * torch.rsqrt(row_sums[..., :count] / width + eps)
        powers = torch.exp(logits - logits.amax(-1, keepdim=True))
        total = powers.sum(-1, keepdim=True)
        ctx.save_for_backward(query, key_weight, row_sums, powers, total, *sources)
        ctx.eps, ctx.gain = eps, gain
        # Divided by the sum of powers at the end, or Inductor would divide each source's row in the inner loop.
        mixed = _weighted_sum(values, powers) * (gain / total)
        return mixed.to(result_dtype(sources))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key_weight, row_sums, powers, total, *sources = ctx.saved_tensors
        if torch.is_grad_enabled():  # the traced program differentiates this gradient again
            return gradients_of_definition(ctx, (query, key_weight, *sources), grad)
        dtype, count, width = powers.dtype, len(sources), sources[0].shape[-1]
        logit_weight = query.to(dtype) * key_weight.to(dtype)
        grad, values = grad.to(dtype), [s.to(dtype) for s in sources]
        scores = torch.cat([(grad * v).sum(-1, keepdim=True) for v in values], -1) * ctx.gain
        weights = powers / total
        grad_logits = weights * (scores - (weights * scores).sum(-1, keepdim=True))
        scales = torch.rsqrt(row_sums[..., :count] / width + ctx.eps)
        # Each of the next two starts from `grad_logits`: Inductor stores what has many operands, and would
        # otherwise take the square roots again for every element of a row.
        weight_factor = grad_logits * scales
        value_factor = grad_logits * scales * scales.square() * row_sums[..., count:] / width
        grad_factor = powers * (ctx.gain / total)
        source_grads = [
            _source_gradient(
                grad,
                value,
                logit_weight,
                grad_factor[..., i, None],
                weight_factor[..., i, None],
                value_factor[..., i, None],
            ).to(source.dtype)
            if ctx.needs_input_grad[4 + i]
            else None
            for i, (source, value) in enumerate(zip(sources, values, strict=True))
        ]
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            return None, None, None, None, *source_grads
        grad_logit_weight = over_tokens(_weighted_sum(values, weight_factor))
        grad_query = (grad_logit_weight * key_weight.to(dtype)).to(query.dtype)
        grad_key_weight = (grad_logit_weight * query.to(dtype)).to(key_weight.dtype)
        return grad_query, grad_key_weight, None, None, *source_grads


def _source_gradient(
    grad: Tensor, value: Tensor, logit_weight: Tensor, grad_factor: Tensor, weight_factor: Tensor, value_factor: Tensor
) -> Tensor:
    return grad * grad_factor + logit_weight * weight_factor - value * value_factor


def _weighted_sum(values: list[Tensor], weights: Tensor) -> Tensor:
    """Sum over S of values [..., D] times the columns of weights [..., S]."""
    mixed = values[0] * weights[..., 0, None]
    for i, value in enumerate(values[1:], 1):
        mixed = mixed + value * weights[..., i, None]
    return mixed
