"""Original against converted model: the check that `convert` runs, and the one a user asks for."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnres_fx.capture.captured import Captured
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.module_clone import uncompiled
from attnres_fx.conversion.calls import program_for
from attnres_fx.conversion.captured_program import CapturedProgram
from attnres_fx.conversion.comparison import VerifyReport
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.paired import Pair
from attnres_fx.conversion.size_check import bar_unchecked_ones, check_other_sizes
from attnres_fx.errors import ArgumentError, CheckError, ConfigError

Check = bool | Literal["outputs"]


def verify(
    model: nn.Module,
    converted: ConvertedModel,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Run original and converted model once, with queries and gates at zero and key gains at one.

    Both run in the converted model's mode, from one random state; neither is changed. With output `"mean"` a network
    with norms differs slightly, through their eps, and `local` computes another function (docs/semantics.md).

    Args:
        model: The original.
        converted: What `convert` made of it.
        args: Arguments to run both with.
        kwargs: Keyword arguments to run both with.

    Returns:
        The largest differences of outputs, gradients of parameters and floating inputs, and buffers.

    Raises:
        ArgumentError: The second model is not converted.
        ExampleError: The original itself fails on the arguments.
        CheckError: The two return other numbers of values, or values of other shapes or dtypes.
    """
    model, converted = uncompiled(model), uncompiled(converted)
    if not isinstance(converted, ConvertedModel):
        raise ArgumentError(
            f"verify takes an original and what convert made of it; the second is a {type(converted).__name__}. The "
            f"original of an attached model is what `with attnres_fx.plain(model) as original:` gives."
        )
    args, kwargs = tuple(args), dict(kwargs or {})
    mode: Mode = "train" if converted.training else "eval"
    program, _ = program_for(converted, args, kwargs)
    return Pair(model, converted, mode, program).compared(args, kwargs, gradients=True)


def require_known(check: Check) -> None:
    """Raise ConfigError for what is no level of checking."""
    if check not in (True, False, "outputs"):
        raise ConfigError(f"check must be True, False or 'outputs'; it is {check!r}.")


def check_conversion(
    model: nn.Module | ExportedProgram, converted: ConvertedModel, captured: Captured, check: Check
) -> None:
    """Raise CheckError where a fresh conversion does not do what the original does.

    In each mode two calls from one state, the second at another batch and length where those are free: outputs,
    gradients and buffers; with `check="outputs"` outputs alone, with False none. Sizes of 1 that were not seen to be
    right are barred from programs of a module, whose calls can be captured again.
    """
    original = model.module() if isinstance(model, ExportedProgram) else model
    for mode, program in converted._attnres_conversion.programs.items():
        check_program(original, converted, mode, program, captured, check)


def check_program(
    original: nn.Module,
    converted: ConvertedModel,
    mode: Mode,
    program: CapturedProgram,
    captured: Captured,
    check: Check,
) -> None:
    """Do for one program what `check_conversion` says."""
    tensors = [*pytree.tree_leaves((captured.args, captured.kwargs)), *converted.parameters()]
    without_data = any(isinstance(t, Tensor) and (t.is_meta or isinstance(t, FakeTensor)) for t in tensors)
    without_example = not captured.args and not captured.kwargs and converted._attnres_conversion.signature.args
    if not check or without_data or without_example:
        bar_unchecked_ones(converted, program)
        return
    pair = Pair(original, converted, mode, program)
    report = pair.compared(captured.args, captured.kwargs, gradients=check is True)
    _require(report, converted)
    check_other_sizes(pair, captured, gradients=check is True)
    converted.report.note_difference(report.worst)


def _require(report: VerifyReport, converted: ConvertedModel) -> None:
    if converted.report.config.keeps_function and not report.passed:
        raise CheckError(
            f"the converted model does not do what the original does: in {report.mode} mode the "
            f"{report.failed[0]}.\n{report}\n"
            f"This is a defect of attnres_fx, or the capture lost something: compare with "
            f"torch.compile(model, backend='eager'). check='outputs' compares outputs alone, check=False nothing."
        )
