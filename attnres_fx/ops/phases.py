"""Two-phase depth attention: one batched read of what a block's reads share, then a merge a read.

    phase 1, once a block:  [mixed_q], [lse_q] = depth_attention_batch(completed, queries, key_weights)
    phase 2, once a read:   out = depth_attention_merge(mixed_q, lse_q, partial, query, key_weight)

Exact: the merge is the online softmax over one source more. Composite, as `depth_attention` is. Phase 1 alone is a read
with several queries.

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
from attnres_fx.ops.dtypes import compute_dtype, result_dtype
from attnres_fx.ops.epilogue import FUSED_FIELDS, Epilogue, NormKind, check_epilogue
from attnres_fx.ops.fused import normed
from attnres_fx.ops.operator import STYLE_ARGUMENTS, check_read, library
from attnres_fx.ops.read_style import ReadStyle, check_style, folded_gain
from attnres_fx.ops.read_tensors import ReadOptions, ReadTensors, read_of, with_delta_added
from attnres_fx.ops.recompute import recomputed
from attnres_fx.ops.reference import mix, row_logit, row_logits, times_scales

BATCH_SCHEMA = (
    "depth_attention_batch(Tensor[] sources, Tensor[] queries, Tensor[] key_weights, float eps, "
    f"{STYLE_ARGUMENTS}) -> Tensor[]"
)
MERGE_SCHEMA = (
    "depth_attention_merge(Tensor mixed, Tensor lse, Tensor partial, Tensor query, Tensor? key_weight, float eps, "
    "float gain, Tensor? delta, int norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    f"ScalarType? dtype, {STYLE_ARGUMENTS}) -> Tensor[]"
)


# --- phase 1 -----------------------------------------------------------------------------------------


def depth_attention_batch(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_weights: Sequence[Tensor] | None,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    scale: float = 1.0,
    value_norm: bool = False,
) -> list[Tensor]:
    """Q reads of the same sources; phase 1 of a two-phase read.

    Args:
        sources: as for `depth_attention`, [..., D] each.
        queries: Q tensors [D].
        key_weights: Q tensors [D], or None for keys without gains.
        eps: added to the mean square of a source.
        bias: [Q, S], added to the logits, one number a query and source.
        scale: as for `depth_attention`.
        value_norm: as for `depth_attention`.

    Returns:
        Q outputs [..., D] (gain 1, in the sources' promoted dtype), then Q log-sum-exps of the logits [...] (float32,
        float64 for float64 sources).

    Raises:
        OperatorError: as `depth_attention` does, and where there are no queries or not as many key_weights.
    """
    if isinstance(sources, Tensor) or isinstance(queries, Tensor) or isinstance(key_weights, Tensor):
        raise OperatorError("depth_attention_batch: sources, queries and key_weights are lists of tensors.")
    sources, queries = list(sources), list(queries)
    gains = None if key_weights is None else list(key_weights)
    style = ReadStyle(bias, scale, value_norm)
    if not any(isinstance(t, Proxy) for t in (*sources, *queries, *(gains or ()), bias)):
        _check_batch(sources, queries, gains, eps, style)
    outputs: list[Tensor] = torch.ops.attnres_fx.depth_attention_batch.default(
        sources, queries, gains or [], float(eps), *style.to_arguments()
    )
    return outputs


def _check_batch(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_weights: Sequence[Tensor] | None,
    eps: float,
    style: ReadStyle[Tensor],
) -> None:
    if not queries or (key_weights is not None and len(queries) != len(key_weights)):
        raise OperatorError(
            f"depth_attention_batch: {len(queries)} queries and {len(key_weights or ())} key_weights; "
            f"there must be as many of each, one a read (key_weights=None for keys without gains)."
        )
    for query, key_weight in zip(queries, _gain_of_each(queries, key_weights), strict=True):
        check_read(sources, query, key_weight, eps)
    check_style("depth_attention_batch", sources, style, queries=len(queries))


def _gain_of_each(queries: Sequence[Tensor], key_weights: Sequence[Tensor] | None) -> Sequence[Tensor | None]:
    return key_weights or [None for _ in queries]


def _batch(
    sources: list[Tensor], queries: list[Tensor], key_weights: list[Tensor], eps: float, *arguments: Any
) -> list[Tensor]:
    style: ReadStyle[Tensor] = ReadStyle.from_arguments(*arguments)
    _check_batch(sources, queries, key_weights or None, eps, style)
    held, bias, value_norm = compute_dtype(sources), style.bias, style.value_norm
    gains = [
        folded_gain(query, key_weight, style.scale, held)
        for query, key_weight in zip(queries, _gain_of_each(queries, key_weights), strict=True)
    ]
    if not is_transformed(sources) and kernels.batch_usable(sources, *queries, *gains, bias):

        def from_weights(tensors: Sequence[Tensor | None]) -> list[Tensor]:
            weights, bias, *given = tensors
            assert weights is not None
            rows = list(weights)
            return batch_definition(_present(given), rows, [torch.ones_like(w) for w in rows], eps, bias, value_norm)

        return kernels.kernel_batch(sources, queries, gains, eps, from_weights, bias=bias, value_norm=value_norm)
    if not runs_in_plain_eager(sources):
        return batch_definition(sources, queries, gains, eps, bias, value_norm)
    first, last = len(sources), len(sources) + len(queries)

    def again(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        *given, bias = tensors
        all_given = _present(given)
        return batch_definition(all_given[:first], all_given[first:last], all_given[last:], eps, bias, value_norm)

    return recomputed(again, [*sources, *queries, *gains, bias])


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def batch_definition(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    eps: float,
    bias: Tensor | None = None,
    value_norm: bool = False,
) -> list[Tensor]:
    """Phase 1 as differentiable aten operations, with the scale of the logits in the key gains."""
    held, out = compute_dtype(sources), result_dtype(sources)
    options = ReadOptions(eps, 1.0, value_norm=value_norm)
    mixtures, sums = [], []
    for q, (query, key_weight) in enumerate(zip(queries, key_weights, strict=True)):
        logit_weight = query.to(held) * key_weight.to(held)
        scales, logits = row_logits(sources, logit_weight, eps, None if bias is None else bias[q])
        weights = torch.softmax(logits, -1).movedim(-1, 0)
        mixtures.append(mix(sources, times_scales(weights, scales, options)).to(out))
        sums.append(torch.logsumexp(logits, -1))
    return [*mixtures, *sums]


# --- phase 2 -----------------------------------------------------------------------------------------


def depth_attention_merge(
    mixed: Tensor,
    lse: Tensor,
    partial: Tensor,
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
    """Phase 2: one read, from its phase-1 output and the one source that phase 1 has not seen.

    Args:
        mixed: [..., D], from `depth_attention_batch`.
        lse: [...], from `depth_attention_batch`.
        partial: [..., D], the block's partial sum.
        query: [D], the one that mixed was made with.
        key_weight: [D] or None, the one that mixed was made with.
        eps: added to the mean square of partial.
        gain: multiplies the mixture.
        delta: [..., D] or None, added to partial; the sum takes its place and is returned second.
        norm: as for `depth_attention_fused`, and so are norm_weight, norm_bias and norm_eps.
        norm_weight: [D] or None.
        norm_bias: [D] or None.
        norm_eps: added to the mean square or the variance.
        dtype: of the first output, by default the one that mixed, partial and delta promote to.
        bias: [1], added to the logit of partial.
        scale: the one that mixed was made with, and so is value_norm.
        value_norm: the one that mixed was made with.

    Returns:
        `[out]` or, with a delta, `[out, partial + delta]`, both [..., D].

    Raises:
        OperatorError: as `depth_attention_fused` does, and where lse is not [...].
    """
    epilogue, style = Epilogue(delta, norm, norm_weight, norm_bias, norm_eps, dtype), ReadStyle(bias, scale, value_norm)
    given = (mixed, lse, partial, query, key_weight, delta, norm_weight, norm_bias, bias)
    if not any(isinstance(t, Proxy) for t in given):
        _check_merge(mixed, lse, partial, query, key_weight, eps)
        check_epilogue("depth_attention_merge", partial, epilogue)
        check_style("depth_attention_merge", [partial], style)
    outputs: list[Tensor] = torch.ops.attnres_fx.depth_attention_merge.default(
        mixed, lse, partial, query, key_weight, float(eps), float(gain), *epilogue.to_arguments(), *style.to_arguments()
    )
    return outputs


def _check_merge(
    mixed: Tensor, lse: Tensor, partial: Tensor, query: Tensor, key_weight: Tensor | None, eps: float
) -> None:
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
    key_weight: Tensor | None,
    eps: float,
    gain: float,
    *arguments: Any,
) -> list[Tensor]:
    epilogue: Epilogue[Tensor] = Epilogue.from_arguments(*arguments[:FUSED_FIELDS])
    style: ReadStyle[Tensor] = ReadStyle.from_arguments(*arguments[FUSED_FIELDS:])
    _check_merge(mixed, lse, partial, query, key_weight, eps)
    check_epilogue("depth_attention_merge", partial, epilogue)
    check_style("depth_attention_merge", [partial], style)
    tensors, options = read_of([partial], query, key_weight, eps, gain, epilogue, style, carry=mixed, carry_lse=lse)
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
    scale, logit = row_logit(partial, summed.query.to(held) * summed.key_weight.to(held), options.eps)
    logit = logit if summed.bias is None else logit + summed.bias.to(held)
    apart = logit - lse.to(held).unsqueeze(-1)
    weights = torch.cat([torch.sigmoid(-apart), torch.sigmoid(apart)], -1) * options.gain
    scales = [torch.ones_like(scale), scale]  # the carry is made of normalised values already
    out = mix([mixed, partial], times_scales(weights.movedim(-1, 0), scales, options))
    out = normed(out, summed, options, options.dtype or result_dtype([mixed, partial]))
    return [out] if tensors.delta is None else [out, partial]


for _schema, _function in ((BATCH_SCHEMA, _batch), (MERGE_SCHEMA, _merge)):
    library.define(_schema)
    for _key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
        library.impl(_schema.partition("(")[0], _function, _key)

#: What stands in a graph, with all arguments by position.
DEPTH_ATTENTION_BATCH = torch.ops.attnres_fx.depth_attention_batch.default
DEPTH_ATTENTION_MERGE = torch.ops.attnres_fx.depth_attention_merge.default
