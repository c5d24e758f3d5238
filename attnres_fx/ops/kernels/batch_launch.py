"""Phase 1 as operators, and differentiable: `attnres_fx::batch_forward`, `attnres_fx::batch_backward`."""

from collections.abc import Sequence
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
    sources: Sequence[Tensor], weights: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At most 16 sources [N, D] against at most 16 weights [Q, D] float32, each a query times its key gain.

    Returns mixed [Q, N, D] in `dtype`, lse [Q, N], logits [S, Q, N] and scales [S, N].
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
    launch(batch.batch_mix, grid, *given, logits, lse, mixed, count, **fixed, **_MIX)
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
) -> list[Tensor]:
    """Gradients of the sources, then of the weights; grads: Q of [N, D], grad_lse [Q, N]."""
    outputs = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in sources]
    queries, width = weights.shape[0], int(weights.shape[1])
    count = sources[0].shape[0]
    if isinstance(count, int) and count == 0:
        return [*outputs, torch.zeros_like(weights)]
    given = (*padded(sources), *padded([s.stride(0) for s in sources], 0))
    fixed = {"S": len(sources), "Q": queries, "D": width}
    scores = torch.empty_like(logits)
    grid: tuple[Any, ...] = (_tiles(count, _SCORES["R"]),)
    launch(batch.batch_scores, grid, *given, *padded(grads), scores, count, **fixed, P=_LEAST, **_SCORES)
    shares = torch.exp(logits - lse)
    grad_logits = shares * (scores - (shares * scores).sum(0) + grad_lse)
    value_factors = (grad_logits * logits).sum(1) * scales.square() / width
    weight_factors = grad_logits * scales.unsqueeze(1)
    grid = (_tiles(count, _MIX["R"]), _tiles(width, _MIX["B"]))
    spread = (*padded(grads), *padded(outputs), weights, shares, weight_factors, value_factors, count)
    launch(batch.batch_spread, grid, *given, *spread, **fixed, **_MIX)
    partial = weights.new_empty((_SHARES, queries, width))
    grid = (_tiles(width, _WEIGHTS["B"]), _SHARES)
    launch(batch.batch_weights, grid, *given, weight_factors, partial, count, **fixed, QP=_LEAST, **_WEIGHTS)
    return [*outputs, partial.sum(0)]


class KernelBatch(torch.autograd.Function):
    """Q mixtures, then Q log-sum-exps; saves the sources and the row statistics."""

    @staticmethod
    def forward(
        ctx: Any, eps: float, dtype: torch.dtype, definition: Definition, weights: Tensor, *sources: Tensor
    ) -> tuple[Tensor, ...]:
        shape = sources[0].shape
        mixed, lse, logits, scales = torch.ops.attnres_fx.batch_forward(
            [as_rows(s) for s in sources], weights, eps, dtype
        )
        ctx.save_for_backward(weights, lse, logits, scales, *sources)
        ctx.set_materialize_grads(False)
        ctx.definition = definition
        return *(m.view(shape) for m in mixed.unbind(0)), *(m.view(shape[:-1]) for m in lse.unbind(0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        weights, lse, logits, scales, *sources = ctx.saved_tensors
        if torch.is_grad_enabled():
            tensors = [weights, *sources]
            return None, None, None, *gradients_again(ctx.definition, tensors, ctx.needs_input_grad[3:], grads)
        rows = [as_rows(s) for s in sources]
        queries = weights.shape[0]
        grad_mixed = [as_rows(g).contiguous() if g is not None else torch.zeros_like(rows[0]) for g in grads[:queries]]
        grad_lse = torch.stack([g.reshape(-1) if g is not None else torch.zeros_like(lse[0]) for g in grads[queries:]])
        *outputs, grad_weights = torch.ops.attnres_fx.batch_backward(
            grad_mixed, grad_lse, rows, weights, lse, logits, scales
        )
        return None, None, None, grad_weights, *(f.view(s.shape) for f, s in zip(outputs, sources, strict=True))


def batch_of(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    eps: float,
    dtype: torch.dtype,
    definition: Definition,
) -> list[Tensor]:
    """Phase 1 of any number of queries over at most 16 sources: outputs [..., D], then log-sum-exps [...]."""
    mixed: list[Tensor] = []
    sums: list[Tensor] = []
    for start in range(0, len(queries), MOST_SOURCES):
        pairs = zip(queries[start : start + MOST_SOURCES], key_weights[start : start + MOST_SOURCES], strict=True)
        weights = torch.stack([q.float() * k.float() for q, k in pairs])
        outputs = KernelBatch.apply(eps, dtype, definition, weights, *sources)
        mixed += outputs[: len(weights)]
        sums += outputs[len(weights) :]
    return [*mixed, *sums]


if INTERPRETED:

    @batch_forward.register_fake
    def _(sources: Any, weights: Any, eps: Any, dtype: Any) -> Any:
        return _forward_outputs(sources, weights, dtype)

    @batch_backward.register_fake
    def _(grads: Any, grad_lse: Any, sources: Any, weights: Any, lse: Any, logits: Any, scales: Any) -> Any:
        return [*(torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in sources), torch.empty_like(weights)]
