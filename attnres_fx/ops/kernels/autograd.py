"""A read of any number of sources on the kernels, differentiable."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.epilogue import NormKind
from attnres_fx.ops.kernels import launch
from attnres_fx.ops.kernels.layout import MOST_SOURCES
from attnres_fx.ops.recompute import Definition, gradients_again

log = logging.getLogger(__name__)

#: Of the tensors of a read that are none of its sources: query, key_weight, delta, norm_weight, norm_bias, carry,
#: carry_lse.
_BESIDE = 7


@dataclass(frozen=True)
class ReadOptions:
    """What of a read is no tensor. norm: a `NormKind`; dtype: of the result."""

    eps: float
    gain: float
    dtype: torch.dtype
    norm: int = NormKind.NONE
    norm_eps: float = 0.0
    delta: bool = False
    threaded: bool = False


class KernelRead(torch.autograd.Function):
    """Groups of at most 16 sources, each one kernel; the mixture of one group is carried into the next.

    Saves the sources, two numbers a row for each, and a norm's two; no mixture but the carried ones.
    Returns the read, the new partial sum (empty without delta), and in `threaded` form every source again but one
    that a delta made new, so that what comes back for it in backward is added inside the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: ReadOptions,
        definition: Definition,
        query: Tensor,
        key_weight: Tensor,
        delta: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        carry: Tensor | None,
        carry_lse: Tensor | None,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        shape = sources[0].shape
        rows = [as_rows(s) for s in sources]
        delta_rows = as_rows(delta) if delta is not None else None
        saves = any(ctx.needs_input_grad)
        saved: list[Tensor] = []
        carried = _carry_rows(carry, carry_lse)
        for group in _groups(len(rows)):
            last = group.stop == len(rows)
            norm = int(options.norm) if last else 0
            out, partial, lse, stats, norm_stats = torch.ops.attnres_fx.read_forward(
                rows[group],
                query,
                key_weight,
                options.eps,
                options.gain if last else 1.0,
                delta_rows if last else None,
                *carried,
                norm,
                norm_weight if norm else None,
                norm_bias if norm else None,
                options.norm_eps,
                options.dtype if last else torch.float32,
                saves,
            )
            saved += [lse, stats, norm_stats] if last else [lse, stats, norm_stats, out]
            carried = out, lse
        if delta is not None:
            partial = partial.view(shape)
        ctx.set_materialize_grads(False)
        if saves:
            kept = [*sources[:-1], partial] if delta is not None else list(sources)
            beside = (query, key_weight, delta, norm_weight, norm_bias, carry, carry_lse)
            ctx.save_for_backward(*beside, sources[-1], *kept, *saved)
        ctx.options, ctx.definition, ctx.count = options, definition, len(sources)
        again = sources[:-1] if options.delta else sources
        threaded = [s.view_as(s) for s in again] if options.threaded else []
        return out.view(shape), partial, *threaded

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_partial: Tensor | None, *arrived: Tensor | None
    ) -> tuple[Any, ...]:
        options: ReadOptions = ctx.options
        beside: tuple[Any, ...] = ctx.saved_tensors[:_BESIDE]
        last_source, *rest = ctx.saved_tensors[_BESIDE:]
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition itself
            tensors = [*beside, *rest[: ctx.count - 1], last_source]
            into = [grad, *([grad_partial] if options.delta else []), *arrived]
            return None, None, *gradients_again(_with_sources(ctx.definition, options), tensors, needs, into)
        delta = beside[2]
        wanted = [bool(n) for n in needs[_BESIDE:]]
        wanted[-1] = wanted[-1] or bool(options.delta and needs[2])
        coming: list[Tensor | None] = list(arrived) if arrived else [None] * (ctx.count - options.delta)
        coming += [grad_partial] if options.delta else []
        weights: list[Tensor | None] = [None] * 6
        grads: list[Tensor | None] = [c if w else None for c, w in zip(coming, wanted, strict=True)]
        if grad is not None:
            saved = _Saved((*beside[:2], *beside[3:]), rest[: ctx.count], rest[ctx.count :])
            weights, grads = _backward(options, saved, grad, coming, wanted, bool(needs[0] or needs[1]))
        for_last = grads[-1]
        for_delta = for_last.to(delta.dtype) if for_last is not None and options.delta and needs[2] else None
        if options.delta and for_last is not None:
            grads[-1] = for_last.to(last_source.dtype) if needs[-1] else None
        return None, None, *weights[:2], for_delta, *weights[2:], *grads


def _groups(count: int) -> list[slice]:
    """As few groups as can be, of sizes as even as can be."""
    groups = -(-count // MOST_SOURCES)
    size = -(-count // groups)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _carry_rows(carry: Tensor | None, carry_lse: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if carry is None or carry_lse is None:
        return None, None
    return as_rows(carry).contiguous(), carry_lse.reshape(-1).float().contiguous()


def _with_sources(definition: Definition, options: ReadOptions) -> Definition:
    """The definition with the outputs of the `threaded` form."""
    if not options.threaded:
        return definition

    def threaded(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        sources = [t for t in tensors[_BESIDE:] if t is not None]
        return [*definition(tensors), *(s.view_as(s) for s in (sources[:-1] if options.delta else sources))]

    return threaded


@dataclass(frozen=True)
class _Saved:
    """beside: query, key_weight, norm_weight, norm_bias, carry, carry_lse. groups: lse, stats and norm_stats of
    each group, and between two of them the mixture carried over."""

    beside: tuple[Any, ...]
    sources: Sequence[Tensor]
    groups: Sequence[Tensor]


def _backward(
    options: ReadOptions,
    saved: _Saved,
    grad: Tensor,
    coming: Sequence[Tensor | None],
    wanted: Sequence[bool],
    for_weights: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the tensors beside the sources but delta, and of the sources; the last group first."""
    query, key_weight, norm_weight, norm_bias, first_carry, first_lse = saved.beside
    rows = [as_rows(s) for s in saved.sources]
    coming_rows = [as_rows(c).contiguous() if c is not None else None for c in coming]
    into, into_lse = as_rows(grad), None
    weights: list[Tensor | None] = [None] * 6
    grads: list[Tensor | None] = [None] * len(rows)
    for at, group in reversed(list(enumerate(_groups(len(rows))))):
        last = group.stop == len(rows)
        lse, stats, norm_stats = saved.groups[4 * at : 4 * at + 3]
        carry, carry_lse = _carry_rows(first_carry, first_lse)
        if at:
            carry, carry_lse = saved.groups[4 * at - 1], saved.groups[4 * at - 4]
        *found, for_query, for_key, for_norm, for_bias, into, into_lse = torch.ops.attnres_fx.read_backward(
            into,
            into_lse,
            coming_rows[group],
            rows[group],
            query,
            key_weight,
            options.gain if last else 1.0,
            carry,
            carry_lse,
            int(options.norm) if last else 0,
            norm_weight if last else None,
            norm_bias if last else None,
            lse,
            stats,
            norm_stats,
            list(wanted[group]),
            for_weights,
        )
        grads[group] = [g.view(grad.shape) if w else None for g, w in zip(found, wanted[group], strict=True)]
        if for_weights:
            before = weights[:2]
            weights[:2] = [
                new if old is None else old + new for old, new in zip(before, (for_query, for_key), strict=True)
            ]
        if last:
            weights[2] = for_norm if norm_weight is not None else None
            weights[3] = for_bias if norm_bias is not None else None
    if first_carry is not None and into_lse is not None:
        weights[4], weights[5] = into.view(first_carry.shape), into_lse.view(first_lse.shape).to(first_lse.dtype)
    return weights, grads


def as_rows(value: Tensor) -> Tensor:
    """[..., D] as [N, D] with numbers of a row side by side: a view where strides allow, else a copy."""
    rows = value.reshape(-1, value.shape[-1])
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    if (
        not torch.compiler.is_compiling()
        and type(value) is Tensor
        and rows.numel()
        and rows.data_ptr() != value.data_ptr()
    ):
        _say_copied(tuple(value.shape), tuple(value.stride()))
    return rows


_said: set[tuple[Any, ...]] = set()


def _say_copied(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    if (shape, strides) not in _said:
        _said.add((shape, strides))
        log.warning(
            "a depth-attention source %s with strides %s is copied: the kernels need whole rows", shape, strides
        )


__all__ = ["KernelRead", "ReadOptions", "as_rows", "launch"]
