"""What a read takes, as two values: its tensors, and the options that are no tensors.

Registered operators and `torch.autograd.Function` take flat lists of arguments. They are turned into these values, and
back, by `read_of`, `ReadTensors.to_flat` and `ReadTensors.from_flat` alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from attnres_fx.ops.dtypes import compute_dtype, result_dtype
from attnres_fx.ops.epilogue import Epilogue, NormKind
from attnres_fx.ops.read_style import ReadStyle, folded_gain

Value = TypeVar("Value")


@dataclass(frozen=True)
class ReadTensors(Generic[Value]):
    """The tensors of one read, or one value for each of them: a gradient, or whether a gradient is needed.

    Args:
        sources: S >= 1 tensors [..., D].
        query: [D].
        key_weight: [D], with the scale of the logits in it.
        delta: [..., D], added to the last source.
        norm_weight: [D], of the norm after the read.
        norm_bias: [D].
        carry: [..., D], a mixture of other sources that the read goes on from.
        carry_lse: [...], the log-sum-exp of the logits that the carry was mixed with.
        bias: [S], added to the logits of the sources.
    """

    sources: tuple[Value, ...]
    query: Value
    key_weight: Value
    delta: Value | None = None
    norm_weight: Value | None = None
    norm_bias: Value | None = None
    carry: Value | None = None
    carry_lse: Value | None = None
    bias: Value | None = None

    @classmethod
    def from_flat(cls, values: Sequence[Any]) -> "ReadTensors[Any]":
        """The inverse of `to_flat`."""
        return cls(tuple(values[_BESIDE:]), *values[:_BESIDE])

    def to_flat(self) -> tuple[Value | None, ...]:
        """All fields in one tuple, for `torch.autograd.Function.apply`: the sources last, None where one is absent."""
        weights = (self.query, self.key_weight, self.delta, self.norm_weight, self.norm_bias)
        return *weights, self.carry, self.carry_lse, self.bias, *self.sources

    def present(self) -> list[Value]:
        """All tensors that are there."""
        return [t for t in self.to_flat() if t is not None]


#: How many fields there are beside the sources.
_BESIDE = len(fields(ReadTensors)) - 1


@dataclass(frozen=True)
class ReadOptions:
    """What of a read is no tensor.

    Args:
        eps: added to the mean square of a source.
        gain: multiplies the mixture.
        norm: a `NormKind`.
        norm_eps: added to the mean square or the variance of the read.
        dtype: of the read; None for the one that its sources, delta and carry promote to.
        returns_sources: whether every source that no delta changes is returned too, as a view of itself.
        value_norm: whether values are divided by their root mean square, as keys are.
    """

    eps: float
    gain: float
    norm: int = NormKind.NONE
    norm_eps: float = 0.0
    dtype: torch.dtype | None = None
    returns_sources: bool = False
    value_norm: bool = False


def read_of(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    eps: float,
    gain: float,
    epilogue: Epilogue[Tensor] = Epilogue(),  # noqa: B008 (frozen)
    style: ReadStyle[Tensor] = ReadStyle(),  # noqa: B008 (frozen)
    *,
    carry: Tensor | None = None,
    carry_lse: Tensor | None = None,
    returns_sources: bool = False,
) -> tuple[ReadTensors[Tensor], ReadOptions]:
    """The tensors and the options of a read from the arguments of a registered operator."""
    around = (epilogue.delta, epilogue.norm_weight, epilogue.norm_bias)
    held = compute_dtype(sources if carry is None else [*sources, carry])
    gain_of_keys = folded_gain(query, key_weight, style.scale, held)
    tensors = ReadTensors(tuple(sources), query, gain_of_keys, *around, carry, carry_lse, style.bias)
    norm = int(epilogue.norm), epilogue.norm_eps
    return tensors, ReadOptions(eps, gain, *norm, epilogue.dtype, returns_sources, style.value_norm)


def with_delta_added(tensors: ReadTensors[Tensor]) -> ReadTensors[Tensor]:
    """The same read with `last source + delta` for its last source, and no delta."""
    if tensors.delta is None:
        return tensors
    *before, last = tensors.sources
    return replace(tensors, sources=(*before, last + tensors.delta), delta=None)


def sources_as_views(tensors: ReadTensors[Tensor], options: ReadOptions) -> list[Tensor]:
    """What `options.returns_sources` asks for: every source as a view, but one that a delta is added to."""
    if not options.returns_sources:
        return []
    unchanged = tensors.sources[:-1] if tensors.delta is not None else tensors.sources
    return [s.view_as(s) for s in unchanged]


def promoted_dtype(tensors: ReadTensors[Tensor]) -> torch.dtype:
    """The dtype that the sources, the delta and the carry promote to."""
    return result_dtype([*tensors.sources, *(t for t in (tensors.delta, tensors.carry) if t is not None)])
