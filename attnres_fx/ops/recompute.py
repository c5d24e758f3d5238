"""Eager autograd for a definition in plain PyTorch: save the inputs, compute again in backward.

One operator's temporaries live at a time, where autograd alone would keep those of every read of a model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Takes the tensors of an operator, `None` where an optional one is absent; gives its outputs.
Definition = Callable[[Sequence[Tensor | None]], list[Tensor]]


def recomputed(definition: Definition, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs of `definition(tensors)`, differentiable any number of times, with only `tensors` saved.

    Args:
        definition: computes the outputs in differentiable operations; it is called again in backward.
        tensors: its inputs, None where an optional one is absent.

    Returns:
        The outputs of the definition.
    """
    return list(_Recomputed.apply(definition, *tensors))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, definition: Definition, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.definition = definition
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(definition(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients_again(ctx.definition, ctx.saved_tensors, ctx.needs_input_grad[1:], grads)


def gradients_again(
    definition: Definition,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of `definition(tensors)`, differentiable themselves where create_graph=True asks for that.

    Args:
        definition: computes the outputs in differentiable operations.
        tensors: its inputs.
        needed: for which inputs a gradient is needed.
        grads: gradients of the outputs, None for zero.

    Returns:
        A gradient for every input, None where none is needed or the input has no part in the outputs.
    """
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh tensors: the same one may stand twice among the inputs, and its gradients are kept apart.
        inputs = [_again(t, need, higher) for t, need in zip(tensors, needed, strict=True)]
        outputs = definition(inputs)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=higher, allow_unused=True
            )
            if pairs
            else [None] * len(wanted)
        )
    return [next(found) if need and t is not None else None for t, need in zip(tensors, needed, strict=True)]


def _again(tensor: Tensor | None, need: bool, higher: bool) -> Tensor | None:
    if tensor is None or not need:
        return tensor
    return tensor.view_as(tensor) if higher else tensor.detach().requires_grad_()
