"""Which program of a converted model a call runs, and the capture of a call that fits none."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.conversion.adopted_graph import captured_program
from attnres_fx.conversion.captured_program import CapturedProgram, bar_ones, current_autocast, flat_arguments
from attnres_fx.conversion.conversion import Conversion
from attnres_fx.conversion.kept_programs import keep, note_use
from attnres_fx.errors import ArgumentError, ModeError
from attnres_fx.ops.dispatch import is_traced

_NO_PYTHON = (
    "This model was made from a graph or a file, and runs only the kinds of calls that it was captured with. What "
    "convert() makes of an nn.Module captures others when they are made."
)
_CANNOT_CAPTURE = (
    "Nothing can be captured inside of a compiled function: make such a call once outside of it, or give convert() one "
    "as its example (Trainer's torch_compile=True calls with num_items_in_batch and labels). ax.compile keeps the "
    "model's Python, compiles it in place, and takes any call."
)

log = logging.getLogger(__name__)


def program_for(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[CapturedProgram, list[Any]]:
    """The program that a call fits, captured now if there is none yet.

    Args:
        model: A ConvertedModel, in the mode of the call.
        args: Of the call, by position.
        kwargs: Of the call, by keyword.

    Returns:
        The program, and its flat inputs.

    Raises:
        ArgumentError: The call fits no program, and cannot be captured.
        EditedError: The model was changed in a way that its programs do not see.
    """
    mode: Mode = "train" if model.training else "eval"
    if is_traced():
        compiled = _compiled_program(model, mode, args, kwargs)
        if compiled is not None:
            return compiled, flat_arguments(compiled, args, kwargs)
    found: tuple[CapturedProgram, list[Any]] = _eager_program_for(model, args, kwargs)
    return found


# A compiled function that breaks off here gets what a capture finds, and does not trace it.
@torch.compiler.disable(
    reason="no program has the flags of the converted model: call it once outside, and compile then"
)
def _eager_program_for(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[CapturedProgram, list[Any]]:
    conversion: Conversion = model._attnres_conversion
    mode: Mode = "train" if model.training else "eval"
    first: CapturedProgram = model.program_of(mode)
    model.attnres.check_written()
    if conversion.edits is not None:
        conversion.edits.check(model)
        if why := conversion.edits.original_changed(mode):
            first = _follow_original(model, mode, args, kwargs, why)
    conversion.note_tensors(model)
    if mode in conversion.outdated:
        first = _captured_for_tensors(model, mode, args, kwargs)
    errors: list[ArgumentError] = []
    autocast = current_autocast()
    submodule = conversion.edits.modules.__getitem__ if conversion.edits is not None else model.get_submodule
    for program in (first, *conversion.further.get(mode, ())):
        if other := program.other_flag(submodule):
            errors.append(ArgumentError(f"{other}."))
            continue
        if program.autocast not in (None, autocast):
            errors.append(ArgumentError("the call is made under another autocast than the captured ones."))
            continue
        try:
            program.assumed.check_tensors(model, submodule)
            if conversion.recapture is not None:
                program.assumed.check_world(model)
                program.signature.require_all_but_defaults(args, kwargs)
            inputs = flat_arguments(program, args, kwargs)
            note_use(conversion, mode, program)
            return program, inputs
        except ArgumentError as error:
            errors.append(error)
    further = _further_program(model, mode, args, kwargs, errors[0])
    return further, flat_arguments(further, args, kwargs)


def _compiled_program(
    model: Any, mode: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> CapturedProgram | None:
    """The program that a compiled function runs: the first one of the mode, the flags of now and these arguments."""
    conversion: Conversion = model._attnres_conversion
    first: CapturedProgram | None = conversion.programs.get(mode)
    if first is None:
        raise ModeError(f"the {mode} program is not captured yet: call model.{mode}() outside the compiled function.")
    programs = (first, *conversion.further.get(mode, ()))
    fitting: list[CapturedProgram] = [p for p in programs if not p.other_flag(model.get_submodule)]
    for program in fitting:
        if program.signature.takes(args, kwargs):
            return program
    if fitting:
        given = (*(f"argument {i + 1}" for i in range(len(args))), *kwargs)
        raise ArgumentError(
            f"the {mode} program was captured with {fitting[0].signature}, and a call with ({', '.join(given)}) is "
            f"compiled. {_CANNOT_CAPTURE}"
        )
    return None


def _further_program(
    model: Any, mode: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: ArgumentError
) -> CapturedProgram:
    """A program for another kind of call, from the original's Python; raises `why` where there is none."""
    conversion: Conversion = model._attnres_conversion
    if conversion.recapture is None:
        raise ArgumentError(f"{why} {_NO_PYTHON}") from why
    if not _accepts(model, args, kwargs):
        raise why
    log.info("%s: a call of another kind is captured in %s mode: %s", conversion.report.model, mode, why)
    try:
        program = _recaptured(model, mode, args, kwargs)
    except ArgumentError as error:
        raise ArgumentError(f"{why} {error}") from error
    keep(model, mode, program)
    return program


def _accepts(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the original takes arguments of these names."""
    try:
        model._attnres_conversion.own.called.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _follow_original(
    model: Any, mode: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: str
) -> CapturedProgram:
    """The program of a mode anew from the original, which was changed and shares its weights with this model."""
    conversion: Conversion = model._attnres_conversion
    assert conversion.edits is not None
    log.info("%s: captured again in %s mode, because %s", conversion.report.model, mode, why)
    conversion.edits.follow()
    program = _recaptured(model, mode, args, kwargs)
    _replace(conversion, mode, program)
    conversion.edits.watch_original_anew(mode, program.watched)
    return program


def _captured_for_tensors(model: Any, mode: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CapturedProgram:
    """The program of a mode anew: a trace writes down some dtypes and devices, and which tensors are one."""
    conversion: Conversion = model._attnres_conversion
    log.info("%s: captured again in %s mode, because %s", conversion.report.model, mode, conversion.why_outdated)
    program = _recaptured(model, mode, args, kwargs)
    _replace(conversion, mode, program)
    conversion.outdated.discard(mode)
    return program


def _replace(conversion: Conversion, mode: Mode, program: CapturedProgram) -> None:
    conversion.programs[mode] = program
    conversion.further.pop(mode, None)


def _recaptured(model: Any, mode: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CapturedProgram:
    recapture = model._attnres_conversion.recapture
    captured, reads = recapture(model, _python_of(model), mode, args, kwargs)
    program = captured_program(
        model, mode, captured.graphs[mode], reads, captured.signature, captured.in_spec, mode == "train"
    )
    bar_ones(program, program.ranges)
    return program


def _python_of(model: Any) -> nn.Module:
    """The modules whose Python a call is captured from, on the model's own tensors.

    Once a change of the original was followed, that is the original as it is now: the tree of the converted model has
    the numbers that it had at the conversion.
    """
    edits = model._attnres_conversion.edits
    original = edits.original() if edits is not None and edits.followed and edits.original is not None else None
    if original is None:
        own: nn.Module = model.original()
        return own
    now, _ = clone_tree(original)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in now.named_modules(remove_duplicate=False):
        if path in modules:
            for store in ("_parameters", "_buffers"):
                held = getattr(modules[path], store)
                getattr(module, store).update({n: held[n] for n in getattr(module, store) if n in held})
    return now
