"""What is fused to a read: the addition before it, the norm and the cast after it, as one value."""

import math
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from attnres_fx.errors import OperatorError

Value = TypeVar("Value")


class NormKind(IntEnum):
    """The norm after a read; registered operators take it as an int."""

    NONE = 0
    RMS = 1
    LAYER = 2


@dataclass(frozen=True)
class Epilogue(Generic[Value]):
    """What an operator does around a read. The fields stand in the order of the registered operators' arguments.

    `Value` is a tensor where an operator runs and a node where a pass looks at its call.

    Args:
        delta: [..., D], added to the last source.
        norm: a `NormKind`.
        norm_weight: [D] or None.
        norm_bias: [D] or None.
        norm_eps: added to the mean square or the variance.
        dtype: of the result; None for the one the sources promote to.
    """

    delta: Value | None = None
    norm: int = NormKind.NONE
    norm_weight: Value | None = None
    norm_bias: Value | None = None
    norm_eps: float = 0.0
    dtype: torch.dtype | None = None

    @classmethod
    def from_arguments(cls, *arguments: Any) -> "Epilogue[Any]":
        """From the arguments of a registered operator that follow those of the read."""
        return cls(*arguments)

    def to_arguments(self) -> tuple[Any, ...]:
        """The arguments of a registered operator that follow those of the read, plain numbers among them."""
        return (self.delta, int(self.norm), self.norm_weight, self.norm_bias, float(self.norm_eps), self.dtype)


#: How many arguments of a registered operator are an epilogue's.
FUSED_FIELDS = len(fields(Epilogue))


def check_epilogue(name: str, last: Tensor, epilogue: Epilogue[Tensor]) -> None:
    """Check what is fused to a read.

    Args:
        name: of the operator, for the message.
        last: [..., D], the last source.
        epilogue: what is fused to the read.

    Raises:
        OperatorError: delta, norm, norm_weight, norm_bias, norm_eps or dtype does not fit the last source.
    """
    delta, norm, norm_eps, dtype = epilogue.delta, epilogue.norm, epilogue.norm_eps, epilogue.dtype
    if delta is not None:
        if not isinstance(delta, Tensor) or not delta.is_floating_point() or delta.shape != last.shape:
            raise OperatorError(f"{name}: delta is {_kind(delta)}; it is added to the last source, {_kind(last)}.")
        _check_device(name, "delta", delta, last)
    if norm not in (NormKind.NONE, NormKind.RMS, NormKind.LAYER):
        raise OperatorError(f"{name}: norm is {norm!r}; it is 0 (none), 1 (RMSNorm) or 2 (LayerNorm).")
    for what, weight in (("norm_weight", epilogue.norm_weight), ("norm_bias", epilogue.norm_bias)):
        if weight is not None:
            _check_norm_weight(name, what, weight, norm, last)
    if not 0 <= norm_eps < math.inf:
        raise OperatorError(f"{name}: norm_eps is {norm_eps}; it must be a finite number that is not negative.")
    if dtype is not None and not dtype.is_floating_point:
        raise OperatorError(f"{name}: dtype is {dtype}; it must be a floating dtype.")


def _check_norm_weight(name: str, what: str, weight: Tensor, norm: int, last: Tensor) -> None:
    if norm == NormKind.NONE:
        raise OperatorError(f"{name}: {what} is given and norm is 0: there is no norm to take it.")
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != last.shape[-1:]:
        raise OperatorError(f"{name}: {what} is {_kind(weight)}; it must be floating point ({last.shape[-1]},).")
    _check_device(name, what, weight, last)


def _check_device(name: str, what: str, tensor: Tensor, last: Tensor) -> None:
    if tensor.device != last.device:
        raise OperatorError(f"{name}: {what} is on {tensor.device} and the sources on {last.device}.")


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
