"""Original against converted model: the check that `convert` runs, and the one a user asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnres_fx.capture.captured import Captured
from attnres_fx.capture.isolated_run import Mode, run_untouched
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.errors import CheckError


@dataclass(frozen=True)
class OutputDifference:
    """How far one output tensor is off.

    Attributes:
        name: Where it stands in what the model returns.
        absolute: Largest absolute difference, in float64.
        relative: That over the largest absolute value of the original's output.
    """

    name: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class VerifyReport:
    """Differences of a converted model's outputs from the original's, at zero queries, in one mode.

    Attributes:
        mode: `"train"` or `"eval"`.
        outputs: One difference for each floating-point output.
        tolerance: The relative difference that is allowed, by the dtypes of the outputs.
    """

    mode: str
    outputs: tuple[OutputDifference, ...]
    tolerance: float

    @property
    def worst(self) -> float:
        """Largest relative difference over all outputs."""
        return max((o.relative for o in self.outputs), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether no output differs by more than the tolerance."""
        return self.worst <= self.tolerance

    def __str__(self) -> str:
        rows = [{"output": o.name, "absolute": o.absolute, "relative": o.relative} for o in self.outputs]
        verdict = "agree" if self.passed else "DIFFER"
        table = tabulate(rows, headers="keys", tablefmt="simple", floatfmt=".2e")
        return f"{self.mode} mode, zero queries: outputs {verdict} to {self.tolerance:.0e}\n\n{table}"


_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def verify(
    model: nn.Module,
    converted: ConvertedModel,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Run original and converted model once, with queries and gates at zero and key gains at one.

    Both run in the converted model's mode, without gradients, from one random state; neither is changed. With output
    `"mean"` a network with norms differs by what their eps makes of it, and `local` starts elsewhere
    (docs/semantics.md).

    Args:
        model: The original.
        converted: What `convert` made of it.
        args: Arguments to run both with.
        kwargs: Keyword arguments to run both with.

    Returns:
        The largest differences, output by output.

    Raises:
        CheckError: The two return other numbers of values, or values of other shapes or dtypes.
    """
    mode, kwargs = converted.mode, dict(kwargs or {})
    before = run_untouched(model, args, {**converted.signature.bound_values, **kwargs}, mode)
    after = _run_at_zero(converted, args, kwargs, mode)
    return _compare(before, after, mode)


def _run_at_zero(converted: ConvertedModel, args: Any, kwargs: Any, mode: Mode) -> Any:
    """Outputs with the added parameters at the values a fresh conversion gives them."""
    at_zero = _AtZero(converted)
    return run_untouched(at_zero, args, kwargs, mode)


class _AtZero(nn.Module):
    def __init__(self, converted: ConvertedModel) -> None:
        super().__init__()
        self.converted = converted
        self.training = converted.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fresh = {
            n: torch.ones_like(p) if n.endswith(".key_weight") else torch.zeros_like(p)
            for n, p in self.converted.named_parameters()
            if n.startswith("attnres.")
        }
        return torch.func.functional_call(self.converted, fresh, args, kwargs)


def _compare(before: Any, after: Any, mode: str) -> VerifyReport:
    pairs, _spec = pytree.tree_flatten_with_path(before)
    leaves = pytree.tree_leaves(after)
    if len(pairs) != len(leaves):
        raise CheckError(f"the converted model returns {len(leaves)} values and the original {len(pairs)}.")
    found, tolerance = [], 0.0
    for (path, x), y in zip(pairs, leaves, strict=True):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            continue
        if not isinstance(y, Tensor) or x.shape != y.shape or x.dtype != y.dtype:
            raise CheckError(f"output {pytree.keystr(path)} is {_kind(x)} in the original and {_kind(y)} here.")
        found.append(_difference(pytree.keystr(path) or "output", x, y))
        tolerance = max(tolerance, _TOLERANCE.get(x.dtype, 8e-2))
    return VerifyReport(mode, tuple(found), tolerance or 1e-5)


def _kind(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _difference(name: str, x: Tensor, y: Tensor) -> OutputDifference:
    x, y = x.detach().double(), y.detach().double()
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)):
        return OutputDifference(name, float("inf"), float("inf"))
    absolute = float(torch.where(finite, x - y, 0).abs().max())
    largest = float(torch.where(finite, x, 0).abs().max())
    return OutputDifference(name, absolute, absolute / largest if largest else absolute)


def check_conversion(model: nn.Module | ExportedProgram, converted: ConvertedModel, captured: Captured) -> None:
    """Raise CheckError where a fresh conversion does not compute what the original computes."""
    tensors = [*pytree.tree_leaves((captured.args, captured.kwargs)), *converted.parameters()]
    if any(isinstance(t, Tensor) and (t.is_meta or isinstance(t, FakeTensor)) for t in tensors):
        return
    if not captured.args and not captured.kwargs and converted.signature.args:
        return
    original = model.module() if isinstance(model, ExportedProgram) else model
    differences = []
    for mode in captured.graphs:
        before = run_untouched(original, captured.args, captured.kwargs, mode)
        report = _compare(before, _run_at_zero(converted, captured.args, captured.kwargs, mode), mode)
        if converted.report.config.output == "sum" and not report.passed:
            raise CheckError(
                f"the converted model does not compute what the original computes:\n{report}\n"
                f"This is a defect of attnres_fx, or the capture lost something: compare with "
                f"torch.export.export(model, args, kwargs).module(). check=False skips this comparison."
            )
        differences.append(report.worst)
    object.__setattr__(converted.report, "difference", max(differences))
