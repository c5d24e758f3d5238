"""A read of any number of sources on the kernels, differentiable."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.dispatch import is_traced
from attnres_fx.ops.kernels.groups import backward_in_groups, forward_in_groups, statistics_from_flat
from attnres_fx.ops.read_tensors import ReadOptions, ReadTensors, sources_as_views
from attnres_fx.ops.recompute import gradients_again

log = logging.getLogger(__name__)

#: A read as differentiable aten operations: what `kernels.kernel_read` returns.
ReadDefinition = Callable[[ReadTensors[Tensor], ReadOptions], list[Tensor]]


class KernelRead(torch.autograd.Function):
    """A read, the sum of last source and delta (empty without a delta), and the sources as `sources_as_views`.

    Saves the sources, two numbers a row for each, and a norm's two; no mixture but those carried between groups.
    Gradients that come in for the returned sources are added inside the kernel.
    """

    @staticmethod
    def forward(ctx: Any, options: ReadOptions, definition: ReadDefinition, *flat: Tensor | None) -> tuple[Tensor, ...]:
        tensors: ReadTensors[Tensor] = ReadTensors.from_flat(flat)
        shape, saves = tensors.sources[0].shape, any(ctx.needs_input_grad)
        out, partial, statistics = forward_in_groups(_all_as_rows(tensors), options, saves)
        if tensors.delta is not None:
            partial = partial.view(shape)
        ctx.set_materialize_grads(False)
        if saves:
            saved = [t for group in statistics for t in group.to_flat()]
            ctx.save_for_backward(*flat, partial if tensors.delta is not None else None, *saved)
        ctx.options, ctx.definition, ctx.count = options, definition, len(flat)
        return out.view(shape), partial, *sources_as_views(tensors, options)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_partial: Tensor | None, *grad_views: Tensor | None
    ) -> tuple[Any, ...]:
        flat, (partial, *saved) = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        tensors: ReadTensors[Tensor] = ReadTensors.from_flat(flat)
        needs: ReadTensors[bool] = ReadTensors.from_flat(ctx.needs_input_grad[2:])
        of_partial = [grad_partial] if tensors.delta is not None else []
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition itself

            def again(inputs: Sequence[Tensor | None]) -> list[Tensor]:
                outputs: list[Tensor] = ctx.definition(ReadTensors.from_flat(inputs), ctx.options)
                return outputs

            grad_outputs = [grad_out, *of_partial, *grad_views]
            return None, None, *gradients_again(again, flat, ctx.needs_input_grad[2:], grad_outputs)
        summed = tensors if partial is None else replace(tensors, sources=(*tensors.sources[:-1], partial), delta=None)
        summed_needs = replace(needs, sources=(*needs.sources[:-1], needs.sources[-1] or bool(needs.delta)))
        # Gradients of the sources from their other users, which the kernel adds to its own.
        other_grads = [*(grad_views or [None] * (len(tensors.sources) - len(of_partial))), *of_partial]
        if grad_out is None:
            needed = zip(other_grads, summed_needs.sources, strict=True)
            grads = ReadTensors[Tensor | None](tuple(g if need else None for g, need in needed), None, None)
        else:
            rows = [None if g is None else as_rows(g).contiguous() for g in other_grads]
            groups = statistics_from_flat(saved)
            grads = backward_in_groups(_all_as_rows(summed), ctx.options, groups, as_rows(grad_out), rows, summed_needs)
        return None, None, *_gradients_of_inputs(grads, tensors, needs).to_flat()


def _gradients_of_inputs(
    grads: ReadTensors[Tensor | None], tensors: ReadTensors[Tensor], needs: ReadTensors[bool]
) -> ReadTensors[Tensor | None]:
    """Gradients in the shapes of what was read; that of `last source + delta` is the gradient of each of the two."""
    *before, last = (None if g is None else g.view(tensors.sources[0].shape) for g in grads.sources)
    delta = None
    if tensors.delta is not None and last is not None:
        delta = last.to(tensors.delta.dtype) if needs.delta else None
        last = last.to(tensors.sources[-1].dtype) if needs.sources[-1] else None
    carry, carry_lse = grads.carry, grads.carry_lse
    if carry is not None and carry_lse is not None and tensors.carry is not None and tensors.carry_lse is not None:
        carry = carry.view(tensors.carry.shape)
        carry_lse = carry_lse.view(tensors.carry_lse.shape).to(tensors.carry_lse.dtype)
    return replace(grads, sources=(*before, last), delta=delta, carry=carry, carry_lse=carry_lse)


def _all_as_rows(tensors: ReadTensors[Tensor]) -> ReadTensors[Tensor]:
    """The same read of rows: what is [..., D] as [N, D], what is [...] as [N]."""
    return replace(
        tensors,
        sources=tuple(as_rows(s) for s in tensors.sources),
        delta=None if tensors.delta is None else as_rows(tensors.delta),
        carry=None if tensors.carry is None else as_rows(tensors.carry).contiguous(),
        carry_lse=None if tensors.carry_lse is None else tensors.carry_lse.reshape(-1).float().contiguous(),
        bias=None if tensors.bias is None else tensors.bias.contiguous(),
    )


def as_rows(value: Tensor) -> Tensor:
    """[..., D] as [N, D] with numbers of a row side by side: a view where strides allow, else a copy."""
    rows = value.reshape(-1, value.shape[-1])
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    if not is_traced() and type(value) is Tensor and rows.numel() and rows.data_ptr() != value.data_ptr():
        _say_copied(tuple(value.shape), tuple(value.stride()))
    return rows


@lru_cache(maxsize=64)  # a layout is told of once, as long as not many others come in between
def _say_copied(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    log.warning("a depth-attention source %s with strides %s is copied: the kernels need whole rows", shape, strides)
