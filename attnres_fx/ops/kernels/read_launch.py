"""A read of one group of sources as operators: `attnres_fx::read_forward`, `attnres_fx::read_backward`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.kernels import read
from attnres_fx.ops.kernels.availability import INTERPRETED
from attnres_fx.ops.kernels.launch import chosen_launch, itemsize, launch, operator, packed, padded
from attnres_fx.ops.kernels.layout import Direction, layout_of

#: Columns and rows of a tile of `sum_rows`.
_SUM_BLOCK, _SUM_TILE = 64, 32


def _constants(
    direction: Direction, sources: Sequence[Tensor], norm: int, value_norm: bool
) -> tuple[dict[str, Any], int]:
    """The constants that a kernel of a read is compiled with, and the number of its programs."""
    width = int(sources[0].shape[1])
    layout, (chosen, programs) = layout_of(width, direction, itemsize(sources)), chosen_launch(direction, sources)
    constants = {"S": len(sources), "D": width, "K": layout.chunks, "C": layout.chunk, "NORM": norm}
    constants |= {"PACKED": packed(sources), "VALUE_NORM": value_norm}
    constants |= {"num_warps": layout.warps, "num_stages": chosen.num_stages}
    return constants, programs


@operator("read_forward")
def read_forward(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    eps: float,
    gain: float,
    delta: Tensor | None,
    carry: Tensor | None,
    carry_lse: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype,
    saves: bool,
    bias: Tensor | None,
    value_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One group of sources; the arguments are fields of `ReadTensors`, as rows, and of `ReadOptions`.

    Args:
        sources: at most 16 tensors [N, D], the numbers of a row side by side.
        saves: whether stats and norm_stats are wanted.

    Returns:
        out [N, D] in `dtype`, the new partial sum [N, D], lse [N], stats [2, S, N] and norm_stats [2, N]; what is not
        asked for is empty.
    """
    outputs = _forward_outputs(sources, delta, norm, dtype, saves)
    count = sources[0].shape[0]
    if isinstance(count, int) and count == 0:
        return outputs
    out, partial, lse, stats, norm_stats = outputs
    constants, programs = _constants("forward", sources, norm, value_norm)
    launch(
        read.read_forward,
        (torch.sym_min(count, programs),),
        *padded(sources),
        *padded([s.stride(0) for s in sources], 0),
        delta,
        delta.stride(0) if delta is not None else 0,
        carry,
        carry_lse,
        query,
        key_weight,
        bias,
        norm_weight,
        norm_bias,
        out,
        partial if delta is not None else None,
        lse,
        stats if saves else None,
        norm_stats if saves and norm else None,
        count,
        eps,
        gain,
        norm_eps,
        **constants,
    )
    return outputs


def _forward_outputs(
    sources: Sequence[Tensor], delta: Tensor | None, norm: int, dtype: torch.dtype, saves: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    last = sources[-1]
    count, width = last.shape
    floats: dict[str, Any] = {"dtype": torch.float32, "device": last.device}
    summed = torch.promote_types(last.dtype, delta.dtype) if delta is not None else last.dtype
    return (
        torch.empty((count, width), dtype=dtype, device=last.device),
        torch.empty((count, width) if delta is not None else (0, width), dtype=summed, device=last.device),
        torch.empty((count,), **floats),
        torch.empty((2, len(sources), count if saves else 0), **floats),
        torch.empty((2, count if saves and norm else 0), **floats),
    )


@operator("read_backward")
def read_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    other_grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    gain: float,
    carry: Tensor | None,
    carry_lse: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lse: Tensor,
    stats: Tensor,
    norm_stats: Tensor,
    sources_need_grad: Sequence[bool],
    weights_need_grad: bool,
    bias: Tensor | None,
    value_norm: bool,
) -> list[Tensor]:
    """Gradients of `read_forward`.

    Args:
        grad_out: [N, D], gradient of out.
        grad_lse: [N], gradient of lse.
        other_grads: [N, D] or None for each source: its gradient from its other users, added to that of the read.
        sources: as for `read_forward`, with the delta in the last one; so are query to norm_bias.
        lse: what `read_forward` returned, and so are stats and norm_stats.
        sources_need_grad: for which sources a gradient is wanted.
        weights_need_grad: whether one is wanted for query and key_weight.
        bias: as for `read_forward`, and so is value_norm.

    Returns:
        Gradients of the sources, then of query, key_weight, norm_weight, norm_bias, carry, carry_lse and bias; empty
        where not wanted.
    """
    outputs = _backward_outputs(
        sources, query, key_weight, carry, norm_weight, norm_bias, sources_need_grad, weights_need_grad, bias
    )
    count, width = sources[0].shape[0], int(sources[0].shape[1])
    if isinstance(count, int) and count == 0:
        for output in outputs:
            output.zero_()
        return outputs
    grad_sources, (grad_query, grad_key_weight, grad_norm_weight, grad_norm_bias, grad_carry, grad_carry_lse, _) = (
        outputs[: len(sources)],
        outputs[len(sources) :],
    )
    constants, programs = _constants("backward", sources, norm, value_norm)
    rows = [
        torch.zeros((programs, width), dtype=torch.float32, device=grad_out.device) if wanted else None
        for wanted in (weights_need_grad, norm_weight is not None, norm_bias is not None)
    ]
    grad_logits = None
    if bias is not None:
        grad_logits = torch.empty((len(sources), count), dtype=torch.float32, device=grad_out.device)
    launch(
        read.read_backward,
        (programs,),
        *padded(sources),
        *padded([s.stride(0) for s in sources], 0),
        *padded([g if wanted else None for g, wanted in zip(grad_sources, sources_need_grad, strict=True)]),
        *padded(other_grads),
        carry,
        carry_lse,
        query,
        key_weight,
        bias,
        norm_weight,
        grad_out,
        grad_out.stride(0),
        grad_lse,
        lse,
        stats,
        norm_stats if norm else None,
        grad_carry if carry is not None else None,
        grad_carry_lse if carry is not None else None,
        grad_logits,
        *rows,
        count,
        gain,
        **constants,
    )
    for summed, factor, out, other, second in (
        (rows[0], key_weight, grad_query, query, grad_key_weight),
        (rows[1], None, grad_norm_weight, None, None),
        (rows[2], None, grad_norm_bias, None, None),
    ):
        if summed is not None:
            _sum_rows(summed, factor, out, other, second)
    if bias is not None and grad_logits is not None:
        outputs[-1] = grad_logits.sum(1).to(bias.dtype)
    return outputs


def _sum_rows(rows: Tensor, factor: Tensor | None, out: Tensor, other: Tensor | None, second: Tensor | None) -> None:
    count, width = rows.shape
    grid = (-(-width // _SUM_BLOCK),)
    launch(
        read.sum_rows,
        grid,
        rows,
        factor,
        other,
        out,
        second,
        count,
        width,
        BLOCK=_SUM_BLOCK,
        TILE=_SUM_TILE,
        num_warps=4,
    )


def _backward_outputs(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    carry: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    sources_need_grad: Sequence[bool],
    weights_need_grad: bool,
    bias: Tensor | None,
) -> list[Tensor]:
    count, width = sources[0].shape
    device = sources[0].device

    def like(value: Tensor | None, wanted: bool) -> Tensor:
        if value is None or not wanted:
            return torch.empty((0,), device=device)
        return torch.empty(value.shape, dtype=value.dtype, device=device)

    outputs = [
        torch.empty((count, width) if wanted else (0, width), dtype=s.dtype, device=device)
        for s, wanted in zip(sources, sources_need_grad, strict=True)
    ]
    outputs += [
        like(query, weights_need_grad),
        like(key_weight, weights_need_grad),
        like(norm_weight, True),
        like(norm_bias, True),
    ]
    carry_rows = torch.empty((count if carry is not None else 0,), device=device)
    return [*outputs, like(carry, True), carry_rows, like(bias, True)]


if INTERPRETED:

    @read_forward.register_fake
    def _(
        sources: Any, query: Any, key_weight: Any, eps: Any, gain: Any, delta: Any, carry: Any, carry_lse: Any,
        norm: Any, norm_weight: Any, norm_bias: Any, norm_eps: Any, dtype: Any, saves: Any, bias: Any, value_norm: Any,
    ) -> Any:  # fmt: skip
        return _forward_outputs(sources, delta, norm, dtype, saves)

    @read_backward.register_fake
    def _(
        grad_out: Any, grad_lse: Any, other_grads: Any, sources: Any, query: Any, key_weight: Any, gain: Any,
        carry: Any, carry_lse: Any, norm: Any, norm_weight: Any, norm_bias: Any, lse: Any, stats: Any,
        norm_stats: Any, sources_need_grad: Any, weights_need_grad: Any, bias: Any, value_norm: Any,
    ) -> Any:  # fmt: skip
        return _backward_outputs(
            sources, query, key_weight, carry, norm_weight, norm_bias, sources_need_grad, weights_need_grad, bias
        )
