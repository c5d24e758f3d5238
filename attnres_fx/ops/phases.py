"""Two-phase depth attention: one batched read of what a block's reads share, then a merge a read.

    phase 1, once a block:  [mixed_q], [lse_q] = depth_attention_batch(completed, queries, key_weights)
    phase 2, once a read:   out = depth_attention_merge(mixed_q, lse_q, partial, query, key_weight)

Exact: the merge is the online softmax over one source more. Composite, as `depth_attention` is.

Source: arXiv 2603.15031, section 4 (two-phase computation).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from attnres_fx.errors import OperatorError
from attnres_fx.ops import kernels
from attnres_fx.ops.dispatch import is_transformed, runs_in_plain_eager
from attnres_fx.ops.epilogue import Epilogue, NormKind, check_epilogue
from attnres_fx.ops.fused import normed
from attnres_fx.ops.operator import check_read, library
from attnres_fx.ops.read_tensors import ReadOptions, ReadTensors, read_of, with_delta_added
from attnres_fx.ops.recompute import recomputed
from attnres_fx.ops.reference import compute_dtype, mix, result_dtype, row_logit

BATCH_SCHEMA = "depth_attention_batch(Tensor[] sources, Tensor[] queries, Tensor[] key_weights, float eps) -> Tensor[]"
MERGE_SCHEMA = (
    "depth_attention_merge(Tensor mixed, Tensor lse, Tensor partial, Tensor query, Tensor key_weight, float eps, "
    "float gain, Tensor? delta, int norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "ScalarType? dtype) -> Tensor[]"
)


# --- phase 1 -----------------------------------------------------------------------------------------


def depth_attention_batch(
    sources: Sequence[Tensor], queries: Sequence[Tensor], key_weights: Sequence[Tensor], *, eps: float = 1e-6
) -> list[Tensor]:
    """Phase 1: Q reads of the same sources.

    Args:
        sources: as for `depth_attention`, [..., D] each.
        queries: Q tensors [D].
        key_weights: Q tensors [D].
        eps: added to the mean square of a source.

    Returns:
        Q outputs [..., D] (gain 1, in the sources' promoted dtype), then Q log-sum-exps of the logits [...] (float32,
        float64 for float64 sources).

    Raises:
        OperatorError: as `depth_attention` does, and where there are no queries or not as many key_weights.
    """
    if isinstance(sources, Tensor) or isinstance(queries, Tensor) or isinstance(key_weights, Tensor):
        raise OperatorError("depth_attention_batch: sources, queries and key_weights are lists of tensors.")
    sources, queries, key_weights = list(sources), list(queries), list(key_weights)
    if not any(isinstance(t, Proxy) for t in (*sources, *queries, *key_weights)):
        _check_batch(sources, queries, key_weights, eps)
    outputs: list[Tensor] = torch.ops.attnres_fx.depth_attention_batch.default(
        sources, queries, key_weights, float(eps)
    )
    return outputs


def _check_batch(
    sources: Sequence[Tensor], queries: Sequence[Tensor], key_weights: Sequence[Tensor], eps: float
) -> None:
    if not queries or len(queries) != len(key_weights):
        raise OperatorError(
            f"depth_attention_batch: {len(queries)} queries and {len(key_weights)} key_weights; "
            f"there must be as many of each, one a read."
        )
    for query, key_weight in zip(queries, key_weights, strict=True):
        check_read(sources, query, key_weight, eps)


def _batch(sources: list[Tensor], queries: list[Tensor], key_weights: list[Tensor], eps: float) -> list[Tensor]:
    _check_batch(sources, queries, key_weights, eps)

    if not is_transformed(sources) and kernels.batch_usable(sources, *queries, *key_weights):

        def from_weights(tensors: Sequence[Tensor | None]) -> list[Tensor]:
            weights, *given = (t for t in tensors if t is not None)
            return batch_definition(given, list(weights), [torch.ones_like(w) for w in weights], eps)

        return kernels.kernel_batch(sources, queries, key_weights, eps, from_weights)
    if not runs_in_plain_eager(sources):
        return batch_definition(sources, queries, key_weights, eps)
    first, last = len(sources), len(sources) + len(queries)

    def again(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        given = [t for t in tensors if t is not None]
        return batch_definition(given[:first], given[first:last], given[last:], eps)

    return recomputed(again, [*sources, *queries, *key_weights])


def batch_definition(
    sources: Sequence[Tensor], queries: Sequence[Tensor], key_weights: Sequence[Tensor], eps: float
) -> list[Tensor]:
    """Phase 1 as differentiable aten operations."""
    held, out = compute_dtype(sources), result_dtype(sources)
    mixtures, sums = [], []
    for query, key_weight in zip(queries, key_weights, strict=True):
        logit_weight = query.to(held) * key_weight.to(held)
        logits = torch.cat([row_logit(s, logit_weight, eps)[1] for s in sources], -1)
        mixtures.append(mix(sources, torch.softmax(logits, -1).movedim(-1, 0)).to(out))
        sums.append(torch.logsumexp(logits, -1))
    return [*mixtures, *sums]


# --- phase 2 -----------------------------------------------------------------------------------------


def depth_attention_merge(
    mixed: Tensor,
    lse: Tensor,
    partial: Tensor,
    query: Tensor,
    key_weight: Tensor,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    delta: Tensor | None = None,
    norm: int = NormKind.NONE,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Phase 2: one read, from its phase-1 output and the one source that phase 1 has not seen.

    Args:
        mixed: [..., D], from `depth_attention_batch`.
        lse: [...], from `depth_attention_batch`.
        partial: [..., D], the block's partial sum.
        query: [D], the one that mixed was made with.
        key_weight: [D], the one that mixed was made with.
        eps: added to the mean square of partial.
        gain: multiplies the mixture.
        delta: [..., D] or None, added to partial; the sum takes its place and is returned second.
        norm: as for `depth_attention_fused`, and so are norm_weight, norm_bias and norm_eps.
        norm_weight: [D] or None.
        norm_bias: [D] or None.
        norm_eps: added to the mean square or the variance.
        dtype: of the first output, by default the one that mixed, partial and delta promote to.

    Returns:
        `[out]` or, with a delta, `[out, partial + delta]`, both [..., D].

    Raises:
        OperatorError: as `depth_attention_fused` does, and where lse is not [...].
    """
    epilogue = Epilogue(delta, norm, norm_weight, norm_bias, norm_eps, dtype)
    given = (mixed, lse, partial, query, key_weight, delta, norm_weight, norm_bias)
    if not any(isinstance(t, Proxy) for t in given):
        _check_merge(mixed, lse, partial, query, key_weight, eps)
        check_epilogue("depth_attention_merge", partial, epilogue)
    outputs: list[Tensor] = torch.ops.attnres_fx.depth_attention_merge.default(
        mixed, lse, partial, query, key_weight, float(eps), float(gain), *epilogue.to_arguments()
    )
    return outputs


def _check_merge(mixed: Tensor, lse: Tensor, partial: Tensor, query: Tensor, key_weight: Tensor, eps: float) -> None:
    check_read([mixed, partial], query, key_weight, eps)
    if not isinstance(lse, Tensor) or not lse.is_floating_point() or lse.shape != mixed.shape[:-1]:
        kind = f"{lse.dtype} {tuple(lse.shape)}" if isinstance(lse, Tensor) else type(lse).__name__
        raise OperatorError(
            f"depth_attention_merge: lse is {kind}; it must be floating point {tuple(mixed.shape[:-1])}, "
            f"one number a row of mixed."
        )
    if lse.device != mixed.device:
        raise OperatorError(f"depth_attention_merge: lse is on {lse.device} and mixed on {mixed.device}.")


def _merge(
    mixed: Tensor,
    lse: Tensor,
    partial: Tensor,
    query: Tensor,
    key_weight: Tensor,
    eps: float,
    gain: float,
    *arguments: Any,
) -> list[Tensor]:
    epilogue: Epilogue[Tensor] = Epilogue.from_arguments(*arguments)
    _check_merge(mixed, lse, partial, query, key_weight, eps)
    check_epilogue("depth_attention_merge", partial, epilogue)
    tensors, options = read_of([partial], query, key_weight, eps, gain, epilogue, carry=mixed, carry_lse=lse)
    if not is_transformed([partial]) and kernels.takes(tensors):
        return kernels.kernel_read(tensors, options, _merge_definition)
    if not runs_in_plain_eager(tensors.present()):
        return _merge_definition(tensors, options)
    summed = with_delta_added(tensors)

    def again(flat: Sequence[Tensor | None]) -> list[Tensor]:
        return _merge_definition(ReadTensors.from_flat(flat), options)

    return [*recomputed(again, summed.to_flat()), *(summed.sources if tensors.delta is not None else ())]


def _merge_definition(tensors: ReadTensors[Tensor], options: ReadOptions) -> list[Tensor]:
    """Phase 2 as differentiable aten operations: the online softmax of two sources, the carry and the partial sum."""
    summed = with_delta_added(tensors)
    (partial,), mixed, lse = summed.sources, summed.carry, summed.carry_lse
    assert mixed is not None and lse is not None
    held = compute_dtype([mixed, partial])
    _, logit = row_logit(partial, summed.query.to(held) * summed.key_weight.to(held), options.eps)
    apart = logit - lse.to(held).unsqueeze(-1)
    weights = torch.cat([torch.sigmoid(-apart), torch.sigmoid(apart)], -1) * options.gain
    out = mix([mixed, partial], weights.movedim(-1, 0))
    out = normed(out, summed, options, options.dtype or result_dtype([mixed, partial]))
    return [out] if tensors.delta is None else [out, partial]


for _schema, _function in ((BATCH_SCHEMA, _batch), (MERGE_SCHEMA, _merge)):
    library.define(_schema)
    for _key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
        library.impl(_schema.partition("(")[0], _function, _key)

#: What stands in a graph, with all arguments by position.
DEPTH_ATTENTION_BATCH = torch.ops.attnres_fx.depth_attention_batch.default
DEPTH_ATTENTION_MERGE = torch.ops.attnres_fx.depth_attention_merge.default
