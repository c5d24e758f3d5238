"""A second call of a fresh conversion, at another batch and length where they are free."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from attnres_fx.capture.captured import Captured
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.conversion.captured_program import CapturedProgram, bar_ones, flat_arguments
from attnres_fx.conversion.comparison import VerifyReport
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.other_sizes import free_places, with_sizes
from attnres_fx.conversion.paired import Pair
from attnres_fx.errors import CheckError


def check_other_sizes(pair: Pair, captured: Captured, *, gradients: bool) -> None:
    """Call both once more, from the state that the first call left, and compare.

    The program's sizes of 1 that were not seen to be right are barred: it was traced at larger ones, and a model may
    take another path there.

    Args:
        pair: After its first call.
        captured: The example of that call.
        gradients: Whether to compare gradients and buffers too.

    Raises:
        CheckError: They differ at sizes that the program takes.
    """
    program, converted = pair.program, pair.converted
    gradients, exact = gradients and not program.lost, converted.report.config.keeps_function
    places = free_places(program.shapes)
    now = _sizes_now(program, pytree.tree_leaves((captured.args, captured.kwargs)))
    checked = {s for s, n in now.items() if n == 1}
    for sizes in _sizes_to_try(program, now, pair.mode):
        ones = [s for s, n in sizes.items() if n == 1]
        shown = _in_words(sizes, places)
        report = _compared(pair, captured, sizes, shown, gradients)
        if report is None:
            continue  # the original does not take these sizes itself, or guards say that the program does not
        if isinstance(report, VerifyReport) and (report.passed or not exact):
            checked |= set(ones)
            break
        if not ones:
            raise CheckError(
                f"the converted model does not do what the original does, in {pair.mode} mode at {shown}: "
                f"{report.failed[0] if isinstance(report, VerifyReport) else report}"
            )
        bar_ones(program, ones)
        _note_ones(converted, [places[s] for s in ones])
        pair = pair.fresh()  # from the state that a first call leaves
        pair.compared(captured.args, captured.kwargs, gradients=False)
    bar_unchecked_ones(converted, program, checked)


def _in_words(sizes: Mapping[str, int], places: Mapping[str, str]) -> str:
    return ", ".join(f"{places[s]} = {n}" for s, n in sizes.items()) or "the example's sizes, a second time"


def bar_unchecked_ones(converted: ConvertedModel, program: CapturedProgram, checked: Collection[str] = ()) -> None:
    """Let a program take from 2 on the free sizes at which it was not run; such calls are captured by themselves."""
    if converted._attnres_conversion.recapture is not None:
        bar_ones(program, [s for s in free_places(program.shapes) if s not in checked])


def _compared(
    pair: Pair, captured: Captured, sizes: Mapping[str, int], shown: str, gradients: bool
) -> VerifyReport | str | None:
    """What a call at these sizes shows; an error of the conversion's as text, None where nothing can be compared."""
    args, kwargs = with_sizes(captured.args, captured.kwargs, pair.program.shapes, sizes)
    try:
        flat_arguments(pair.program, args, kwargs)
        before = pair.originals(args, kwargs, gradients=gradients)
    except Exception:  # the guards', or whatever the original raises
        return None
    try:
        after = pair.conversions(args, kwargs, gradients=gradients)
        return pair.report(before, after, shown)
    except Exception as error:  # whatever the program raises where the original does not
        return f"{type(error).__name__}: {error}"


def _sizes_to_try(program: CapturedProgram, now: Mapping[str, int], mode: Mode) -> list[dict[str, int]]:
    """Sizes in the order in which they tell most: batch and length of one, another length, a batch of one, as it is."""
    batches = {s.sizes[0] for s in program.shapes if s is not None and s.sizes and isinstance(s.sizes[0], str)}
    batch = {s: 2 if n == 1 else 1 for s, n in now.items() if s in batches}
    shorter = {s: max(1, n - 1) for s, n in now.items() if s not in batches}
    ones = dict.fromkeys(shorter, 1) if mode == "eval" else shorter
    tried: list[dict[str, int]] = []
    for sizes in ({**batch, **ones}, {**batch, **shorter}, batch, shorter, {}):
        if sizes not in tried:
            tried.append(sizes)
    return tried


def _sizes_now(program: CapturedProgram, leaves: Sequence[Any]) -> dict[str, int]:
    """The free sizes of an example, by symbol."""
    now: dict[str, int] = {}
    for shape, leaf in zip(program.shapes, leaves, strict=True):
        for size, wanted in zip(leaf.shape, shape.sizes, strict=True) if shape is not None else ():
            if isinstance(wanted, str):
                now.setdefault(wanted, size)
    return now


def _note_ones(converted: ConvertedModel, places: Sequence[str]) -> None:
    note = (
        f"{' and '.join(places)}: at 1 the first graph does not compute what the model does; such calls get their own"
    )
    converted.report.add_note(note)
