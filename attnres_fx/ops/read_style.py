"""What production models do in a read beside what the paper writes down, as one value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from attnres_fx.errors import OperatorError

Value = TypeVar("Value")


@dataclass(frozen=True)
class ReadStyle(Generic[Value]):
    """Options of a read, each off by default. They stand in the order of the registered operators' last arguments.

    `Value` is a tensor where an operator runs and a node where a pass looks at its call.

    Args:
        bias: [S], added to the logits, one number a source; of several queries [Q, S].
        scale: multiplies the products of query and keys, before the bias is added.
        value_norm: whether values are divided by their root mean square, as keys are; a key gain is for keys alone.
    """

    bias: Value | None = None
    scale: float = 1.0
    value_norm: bool = False

    @classmethod
    def from_arguments(cls, *arguments: Any) -> "ReadStyle[Any]":
        """From what follows the other arguments of a registered operator; nothing follows in a plain read."""
        return cls(*arguments)

    def to_arguments(self) -> tuple[Any, ...]:
        """What to call a registered operator with, after its other arguments: nothing for a plain read."""
        return () if self == ReadStyle() else (self.bias, float(self.scale), bool(self.value_norm))


def check_style(name: str, sources: Sequence[Tensor], style: ReadStyle[Tensor], *, queries: int | None = None) -> None:
    """Check the options of a read.

    Args:
        name: of the operator, for the message.
        sources: S tensors [..., D]; of a merge, the one source that it adds.
        style: the options.
        queries: how many there are, None for an operator that takes one.

    Raises:
        OperatorError: the bias is not floating point [S], or [Q, S], on the device of the sources; scale is not finite.
    """
    bias, scale = style.bias, style.scale
    if not -math.inf < scale < math.inf:
        raise OperatorError(f"{name}: scale is {scale}; it must be a finite number.")
    if bias is None:
        return
    shape = (len(sources),) if queries is None else (queries, len(sources))
    if not isinstance(bias, Tensor) or not bias.is_floating_point() or bias.shape != shape:
        kind = f"{bias.dtype} {tuple(bias.shape)}" if isinstance(bias, Tensor) else type(bias).__name__
        raise OperatorError(f"{name}: bias is {kind}; it must be floating point {shape}, one number a source.")
    if bias.device != sources[0].device:
        raise OperatorError(f"{name}: bias is on {bias.device} and the sources on {sources[0].device}.")


def folded_gain(query: Tensor, key_weight: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """The key gain of a read without a scale that has the same logits: only query times gain enters them.

    Args:
        query: [D].
        key_weight: [D], None for none.
        scale: of the logits.
        dtype: of the read's arithmetic.

    Returns:
        [D], differentiable in `key_weight`; `key_weight` itself where there is nothing to fold.
    """
    if key_weight is None:
        return torch.full_like(query, scale, dtype=dtype)
    return key_weight if scale == 1.0 else key_weight.to(dtype) * scale
