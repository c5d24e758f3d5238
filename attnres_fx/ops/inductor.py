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

from attnres_fx.ops.dtypes import compute_dtype, result_dtype
from attnres_fx.ops.read_tensors import ReadOptions, ReadTensors
from attnres_fx.ops.reference import gradients_of_definition, over_tokens


class TracedDepthAttention(torch.autograd.Function):
    """The definition for AOTAutograd to trace: saves the inputs and 3 S + 1 numbers a row, nothing else.

    Takes the options of the read, and its tensors as `ReadTensors.to_flat` has them.
    """

    @staticmethod
    def forward(ctx: Any, options: ReadOptions, *flat: Tensor | None) -> Tensor:
        tensors: ReadTensors[Tensor] = ReadTensors.from_flat(flat)
        sources, gain = tensors.sources, options.gain
        dtype, count, width = compute_dtype(sources), len(sources), sources[0].shape[-1]
        logit_weight = tensors.query.to(dtype) * tensors.key_weight.to(dtype)
        values = [s.to(dtype) for s in sources]
        sums = [v.square().sum(-1, keepdim=True) for v in values]
        sums += [(v * logit_weight).sum(-1, keepdim=True) for v in values]
        row_sums = torch.cat(sums, -1)
        scales = torch.rsqrt(row_sums[..., :count] / width + options.eps)
        logits = row_sums[..., count:] * scales
        if tensors.bias is not None:
            logits = logits + tensors.bias.to(dtype)
        powers = torch.exp(logits - logits.amax(-1, keepdim=True))
        total = powers.sum(-1, keepdim=True)
        ctx.save_for_backward(row_sums, powers, total, *flat)
        ctx.options = options
        # Divided by the sum of powers at the end, or Inductor would divide each source's row in the inner loop.
        mixed = _weighted_sum(values, powers * scales if options.value_norm else powers) * (gain / total)
        return mixed.to(result_dtype(sources))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        row_sums, powers, total, *flat = ctx.saved_tensors
        if torch.is_grad_enabled():  # the traced program differentiates this gradient again
            return gradients_of_definition(ctx, flat, grad)
        tensors: ReadTensors[Tensor] = ReadTensors.from_flat(flat)
        needs: ReadTensors[bool] = ReadTensors.from_flat(ctx.needs_input_grad[1:])
        return None, *_gradients(tensors, ctx.options, (row_sums, powers, total), grad, needs).to_flat()


def _gradients(
    tensors: ReadTensors[Tensor],
    options: ReadOptions,
    statistics: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    needs: ReadTensors[bool],
) -> ReadTensors[Tensor | None]:
    """Gradients of a read from the sums, powers and total [..., 2 S], [..., S], [..., 1] of its rows."""
    row_sums, powers, total = statistics
    sources, dtype = tensors.sources, powers.dtype
    count, width = len(sources), sources[0].shape[-1]
    logit_weight = tensors.query.to(dtype) * tensors.key_weight.to(dtype)
    grad, values = grad.to(dtype), [s.to(dtype) for s in sources]
    scores = torch.cat([(grad * v).sum(-1, keepdim=True) for v in values], -1) * options.gain
    scales = torch.rsqrt(row_sums[..., :count] / width + options.eps)
    scores = scores * scales if options.value_norm else scores
    weights = powers / total
    grad_logits = weights * (scores - (weights * scores).sum(-1, keepdim=True))
    # Each of the next two starts from `grad_logits`: Inductor stores what has many operands, and would
    # otherwise take the square roots again for every element of a row.
    weight_factor = grad_logits * scales
    value_factor = grad_logits * scales * scales.square() * row_sums[..., count:] / width
    grad_factor = powers * (options.gain / total)
    if options.value_norm:  # the scale is in the value too
        value_factor = value_factor + weights * scores * scales.square() / width
        grad_factor = grad_factor * scales
    source_grads = [
        _source_gradient(
            grad,
            value,
            logit_weight,
            grad_factor[..., i, None],
            weight_factor[..., i, None],
            value_factor[..., i, None],
        ).to(source.dtype)
        if needs.sources[i]
        else None
        for i, (source, value) in enumerate(zip(sources, values, strict=True))
    ]
    bias = tensors.bias
    grad_bias = None if bias is None or not needs.bias else over_tokens(grad_logits).to(bias.dtype)
    if not (needs.query or needs.key_weight):
        return ReadTensors[Tensor | None](tuple(source_grads), None, None, bias=grad_bias)
    grad_logit_weight = over_tokens(_weighted_sum(values, weight_factor))
    return ReadTensors[Tensor | None](
        tuple(source_grads),
        (grad_logit_weight * tensors.key_weight.to(dtype)).to(tensors.query.dtype),
        (grad_logit_weight * tensors.query.to(dtype)).to(tensors.key_weight.dtype),
        bias=grad_bias,
    )


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
