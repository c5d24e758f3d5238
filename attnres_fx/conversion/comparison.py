"""How far the outcome of one call is from another's: outputs, gradients and buffers."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_fx.conversion.trial import HeldTensor, Outcome
from attnres_fx.errors import CheckError
from attnres_fx.report_page import ReportPage, Shown

_OUTPUTS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_GRADIENTS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-2, torch.bfloat16: 2e-1}
#: Gradients far below the largest one are made of rounding.
_SMALL = 1e-2


@dataclass(frozen=True)
class Difference:
    """How far one tensor is off.

    Attributes:
        kind: `"output"`, `"gradient"` or `"buffer"`.
        name: Where it stands in what the model returns, or the name of the parameter, input or buffer.
        absolute: Largest absolute difference, in float64.
        relative: That over the largest absolute value of the original's; for gradients over at least a hundredth of
            the largest gradient of all.
        tolerance: The relative difference that is allowed, by the coarsest dtype on the way.
    """

    kind: str
    name: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        return f"{self.kind} {self.name} is off by {self.relative:.1e} (allowed {self.tolerance:.0e})"


@dataclass(frozen=True, repr=False)
class VerifyReport(Shown):
    """Differences of a converted model from the original, at zero queries, in one mode.

    Attributes:
        mode: `"train"` or `"eval"`.
        differences: Of every floating output, gradient and buffer, in that order.
        sizes: The sizes of the arguments, in words.
    """

    mode: str
    differences: tuple[Difference, ...]
    sizes: str = ""

    @property
    def outputs(self) -> tuple[Difference, ...]:
        """The differences of the outputs."""
        return tuple(d for d in self.differences if d.kind == "output")

    @property
    def worst(self) -> float:
        """Largest relative difference over all outputs."""
        return max((d.relative for d in self.outputs), default=0.0)

    @property
    def failed(self) -> tuple[Difference, ...]:
        """The differences above their tolerance."""
        return tuple(d for d in self.differences if not d.passed)

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than its tolerance."""
        return not self.failed

    def _page(self) -> ReportPage:
        shown = {d for kind in ("output", "gradient", "buffer") for d in self._worst_of(kind)}
        numbers = ("absolute", "relative", "allowed")
        rows = [
            {
                "what": d.kind,
                "name": d.name,
                **{n: f"{x:.2e}" for n, x in zip(numbers, (d.absolute, d.relative, d.tolerance), strict=True)},
            }
            for d in self.differences
            if d in shown
        ]
        verdict = "agree" if self.passed else "DIFFER"
        counts = ", ".join(
            f"{sum(d.kind == k for d in self.differences)} {k}s" for k in ("output", "gradient", "buffer")
        )
        where = f", {self.sizes}" if self.sizes else ""
        head = f"{self.mode} mode, zero queries{where}: {counts} {verdict}"
        return ReportPage((head, "the largest of each:"), rows, right=numbers)

    def _worst_of(self, kind: str, count: int = 4) -> list[Difference]:
        of_kind = [d for d in self.differences if d.kind == kind]
        return sorted(of_kind, key=lambda d: d.relative, reverse=True)[:count]


def differences_of(before: Outcome, after: Outcome, computed_in: Collection[torch.dtype] = ()) -> Iterator[Difference]:
    """The difference of every floating output, gradient and buffer.

    Args:
        before: What the original gave.
        after: What the conversion gave.
        computed_in: Dtypes of what is computed from reads: a float32 gradient of a computation in bfloat16 is no more
            exact than bfloat16.

    Raises:
        CheckError: The two return other numbers of values, or values of other kinds.
    """
    if before.outputs.keys() != after.outputs.keys():
        raise CheckError(
            f"the converted model returns {len(after.outputs)} values and the original {len(before.outputs)}."
        )
    for name, x in before.outputs.items():
        y = after.outputs[name]
        _require_same_kind(name, x, y, with_gradients=bool(before.gradients))
        if isinstance(x, HeldTensor) and isinstance(y, HeldTensor):
            yield _difference("output", name, x.value, y.value, 0.0, _allowed(_OUTPUTS, x.value.dtype, computed_in))
    yield from _gradient_differences(before, after, computed_in)
    for name, buffer in before.buffers.items():
        if name in after.buffers:
            tolerance = _allowed(_OUTPUTS, buffer.dtype, computed_in)
            yield _difference("buffer", name, buffer, after.buffers[name], 0.0, tolerance)


def _require_same_kind(name: str, x: Any, y: Any, *, with_gradients: bool) -> None:
    if not isinstance(x, HeldTensor):
        if not isinstance(y, HeldTensor) and x != y:
            raise CheckError(f"output {name} is {y!r} and in the original {x!r}.")
        return
    if not isinstance(y, HeldTensor) or x.value.shape != y.value.shape or x.value.dtype != y.value.dtype:
        raise CheckError(f"output {name} is {_kind(x)} in the original and {_kind(y)} here.")
    if with_gradients and y.requires_grad and not x.requires_grad:
        raise CheckError(f"output {name} has a gradient, and in the original it has none.")


def _allowed(
    tolerances: Mapping[torch.dtype, float], dtype: torch.dtype, computed_in: Collection[torch.dtype]
) -> float:
    if not dtype.is_floating_point:
        return 0.0
    return max(tolerances.get(d, tolerances[torch.bfloat16]) for d in {dtype, *computed_in})


def _gradient_differences(
    before: Outcome, after: Outcome, computed_in: Collection[torch.dtype]
) -> Iterator[Difference]:
    """Of the gradients that either has; one that is missing is zero."""
    known = [g for g in before.gradients.values() if g is not None and g.numel()]
    largest = max((float(g.abs().max()) for g in known), default=0.0)
    for name, gradient in before.gradients.items():
        pair = gradient, after.gradients.get(name)
        present = next((g for g in pair if g is not None), None)
        if present is not None:
            x, y = (torch.zeros_like(present) if g is None else g for g in pair)
            tolerance = _allowed(_GRADIENTS, x.dtype, computed_in)
            yield _difference("gradient", name, x, y, _SMALL * largest, tolerance)


def _kind(x: Any) -> str:
    return f"{x.value.dtype} {tuple(x.value.shape)}" if isinstance(x, HeldTensor) else type(x).__name__


def _difference(kind: str, name: str, x: Tensor, y: Tensor, floor: float, tolerance: float) -> Difference:
    if x.numel() == 0:
        return Difference(kind, name, 0.0, 0.0, tolerance)
    if x.shape != y.shape:
        return Difference(kind, name, math.inf, math.inf, tolerance)
    wide = torch.complex128 if x.is_complex() else torch.float64
    x, y = x.to(wide), y.to(wide)
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)):
        return Difference(kind, name, math.inf, math.inf, tolerance)
    absolute = float(torch.where(finite, x - y, 0).abs().max())
    largest = max(float(torch.where(finite, x, 0).abs().max()), floor)
    return Difference(kind, name, absolute, absolute / largest if largest else absolute, tolerance)
