"""Results of a program that has no gradients: a backward through them says why."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_fx.errors import ModeError


class _Refused(torch.autograd.Function):
    """Hands tensors through; its backward raises."""

    @staticmethod
    def forward(ctx: Any, why: str, _: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.why = why
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ModeError(ctx.why)


def refusing_backward(outputs: Sequence[Any], why: str) -> tuple[Any, ...]:
    """Outputs that were computed without gradients, and raise ModeError where they are differentiated.

    Args:
        outputs: Of a graph.
        why: What the error says.
    """
    places = [i for i, x in enumerate(outputs) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    refused = _Refused.apply(why, torch.zeros((), requires_grad=True), *(outputs[i] for i in places))
    found = dict(zip(places, refused, strict=True))
    return tuple(found.get(i, x) for i, x in enumerate(outputs))
