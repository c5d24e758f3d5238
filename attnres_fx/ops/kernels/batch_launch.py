"""Phase 1 as operators, and differentiable: `attnres_fx::batch_forward`, `attnres_fx::batch_backward`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.kernels import batch
from attnres_fx.ops.kernels.autograd import as_rows
from attnres_fx.ops.kernels.availability import INTERPRETED
from attnres_fx.ops.kernels.launch import launch, operator, padded
from attnres_fx.ops.kernels.layout import MOST_SOURCES
from attnres_fx.ops.recompute import Definition, gradients_again

#: Rows and columns of a tile, and warps; fixed, since they decide the order of sums.
_LOGITS = {"R": 64, "B": 64, "num_warps": 4}
_MIX = {"R": 4, "B": 256, "num_warps": 4}
_SCORES = {"R": 4, "B": 64, "num_warps": 4}
_WEIGHTS = {"R": 32, "B": 64, "num_warps": 4}
#: Programs that share the rows of a weight gradient.
_SHARES = 16
_LEAST = 16


def _tiles(count: Any, size: int) -> Any:
    return (count + size - 1) // size


@operator("batch_forward")
def batch_forward(
    sources: Sequence[Tensor], weights: Tensor, eps: float, dtype: torch.dtype, bias: Tensor | None, value_norm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At most 16 sources [N, D] against at most 16 weights [Q, D] float32, each a query times its key gain.

    Returns mixed [Q, N, D] in `dtype`, lse [Q, N], logits [S, Q, N] without the bias [Q, S], and scales [S, N].
    """
    outputs = _forward_outputs(sources, weights, dtype)
    mixed, lse, logits, scales = outputs
    queries, width = weights.shape[0], int(weights.shape[1])
    count = sources[0].shape[0]
    if isinstance(count, int) and count == 0:
        return outputs
    given = (*padded(sources), *padded([s.stride(0) for s in sources], 0))
    fixed = {"S": len(sources), "Q": queries, "D": width}
    launch(
        batch.batch_logits,
        (_tiles(count, _LOGITS["R"]),),
        *given,
        weights,
        bias,
        logits,
        scales,
        lse,
        count,
        eps,
        **fixed,
        QP=_LEAST,
        **_LOGITS,
    )
    grid = (_tiles(count, _MIX["R"]), _tiles(width, _MIX["B"]))
    factors = scales if value_norm else None
    launch(batch.batch_mix, grid, *given, logits, lse, bias, factors, mixed, count, **fixed, **_MIX)
    return outputs


def _forward_outputs(
    sources: Sequence[Tensor], weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (count, width), queries = sources[0].shape, weights.shape[0]
    return (
        weights.new_empty((queries, count, width), dtype=dtype),
        weights.new_empty((queries, count)),
        weights.new_empty((len(sources), queries, count)),
        weights.new_empty((len(sources), count)),
    )


@operator("batch_backward")
def batch_backward(
    grads: Sequence[Tensor],
    grad_lse: Tensor,
    sources: Sequence[Tensor],
    weights: Tensor,
    lse: Tensor,
    logits: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    value_norm: bool,
) -> list[Tensor]:
    """Gradients of the sources, then of weights and bias (empty without); grads: Q of [N, D], grad_lse [Q, N]."""
    outputs = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in sources]
    queries, width = weights.shape[0], int(weights.shape[1])
    count = sources[0].shape[0]
    if isinstance(count, int) and count == 0:
        return [*outputs, torch.zeros_like(weights), _grad_of(bias).zero_()]
    given = (*padded(sources), *padded([s.stride(0) for s in sources], 0))
    fixed = {"S": len(sources), "Q": queries, "D": width}
    scores = torch.empty_like(logits)
    grid: tuple[Any, ...] = (_tiles(count, _SCORES["R"]),)
    launch(batch.batch_scores, grid, *given, *padded(grads), scores, count, **fixed, P=_LEAST, **_SCORES)
    shares = torch.exp((logits if bias is None else logits + bias.float().t().unsqueeze(-1)) - lse)
    if value_norm:
        scores = scores * scales.unsqueeze(1)
    grad_logits = shares * (scores - (shares * scores).sum(0) + grad_lse)
    along = grad_logits * logits
    grad_bias = _grad_of(bias) if bias is None else grad_logits.sum(2).t().to(bias.dtype).contiguous()
    if value_norm:
        along, shares = along + shares * scores, shares * scales.unsqueeze(1)
    value_factors = along.sum(1) * scales.square() / width
    weight_factors = grad_logits * scales.unsqueeze(1)
    grid = (_tiles(count, _MIX["R"]), _tiles(width, _MIX["B"]))
    spread = (*padded(grads), *padded(outputs), weights, shares, weight_factors, value_factors, count)
    launch(batch.batch_spread, grid, *given, *spread, **fixed, **_MIX)
    partial = weights.new_empty((_SHARES, queries, width))
    grid = (_tiles(width, _WEIGHTS["B"]), _SHARES)
    launch(batch.batch_weights, grid, *given, weight_factors, partial, count, **fixed, QP=_LEAST, **_WEIGHTS)
    return [*outputs, partial.sum(0), grad_bias]


def _grad_of(bias: Tensor | None) -> Tensor:
    return torch.empty(0) if bias is None else torch.empty_like(bias)


@dataclass(frozen=True)
class BatchOptions:
    """What of a phase 1 is no tensor.

    Args:
        eps: added to the mean square of a source.
        dtype: of the mixtures.
        value_norm: whether values are divided by their root mean square.
    """

    eps: float
    dtype: torch.dtype
    value_norm: bool


class KernelBatch(torch.autograd.Function):
    """Q mixtures, then Q log-sum-exps; saves the sources and the row statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        options: BatchOptions,
        definition: Definition,
        weights: Tensor,
        bias: Tensor | None,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        shape = sources[0].shape
        mixed, lse, logits, scales = torch.ops.attnres_fx.batch_forward(
            [as_rows(s) for s in sources], weights, options.eps, options.dtype, bias, options.value_norm
        )
        ctx.save_for_backward(lse, logits, scales, weights, bias, *sources)
        ctx.set_materialize_grads(False)
        ctx.definition, ctx.options = definition, options
        return *(m.view(shape) for m in mixed.unbind(0)), *(m.view(shape[:-1]) for m in lse.unbind(0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        lse, logits, scales, weights, bias, *sources = ctx.saved_tensors
        if torch.is_grad_enabled():
            tensors = [weights, bias, *sources]
            return None, None, *gradients_again(ctx.definition, tensors, ctx.needs_input_grad[2:], grads)
        rows = [as_rows(s) for s in sources]
        queries = weights.shape[0]
        grad_mixed = [as_rows(g).contiguous() if g is not None else torch.zeros_like(rows[0]) for g in grads[:queries]]
        grad_lse = torch.stack([g.reshape(-1) if g is not None else torch.zeros_like(lse[0]) for g in grads[queries:]])
        *outputs, grad_weights, grad_bias = torch.ops.attnres_fx.batch_backward(
            grad_mixed, grad_lse, rows, weights, lse, logits, scales, bias, ctx.options.value_norm
        )
        grad_sources = [f.view(s.shape) for f, s in zip(outputs, sources, strict=True)]
        return None, None, grad_weights, None if bias is None else grad_bias, *grad_sources


def batch_of(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    options: BatchOptions,
    definition: Definition,
    bias: Tensor | None,
) -> list[Tensor]:
    """Phase 1 of any number of queries over at most 16 sources: outputs [..., D], then log-sum-exps [...]."""
    mixed: list[Tensor] = []
    sums: list[Tensor] = []
    for start in range(0, len(queries), MOST_SOURCES):
        some = slice(start, start + MOST_SOURCES)
        weights = torch.stack([q.float() * k.float() for q, k in zip(queries[some], key_weights[some], strict=True)])
        part = None if bias is None else bias[some].contiguous()
        outputs = KernelBatch.apply(options, definition, weights, part, *sources)
        mixed += outputs[: len(weights)]
        sums += outputs[len(weights) :]
    return [*mixed, *sums]


if INTERPRETED:

    @batch_forward.register_fake
    def _(sources: Any, weights: Any, eps: Any, dtype: Any, bias: Any, value_norm: Any) -> Any:
        return _forward_outputs(sources, weights, dtype)

    @batch_backward.register_fake
    def _(
        grads: Any, grad_lse: Any, sources: Any, weights: Any, lse: Any, logits: Any, scales: Any, bias: Any,
        value_norm: Any,
    ) -> Any:  # fmt: skip
        grad_sources = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in sources]
        return [*grad_sources, torch.empty_like(weights), _grad_of(bias)]
