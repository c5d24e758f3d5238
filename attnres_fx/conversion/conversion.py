"""What a converted model holds beside the original's modules: its programs, and how they are called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from attnres_fx.capture.captured import Captured
from attnres_fx.capture.held_values import Library
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.signature import CallSignature
from attnres_fx.capture.watched import WatchedValue
from attnres_fx.conversion.adopted_graph import CONSTANTS
from attnres_fx.conversion.captured_program import CapturedProgram
from attnres_fx.conversion.edits import EditGuard
from attnres_fx.conversion.own_python import OwnPython
from attnres_fx.conversion.report import ConversionReport
from attnres_fx.conversion.tensors_as_captured import TensorsAsCaptured
from attnres_fx.errors import AttnResError, CheckError, EditedError, SaveError
from attnres_fx.passes.lowering.lower import Lowering
from attnres_fx.passes.rewrite.execution import Replacement

#: The children that a conversion adds.
ADDED = ("attnres", CONSTANTS)

#: Captures a call: (converted model, module to capture, mode, args, kwargs) -> the capture, and its reads.
Recapture = Callable[
    [Any, nn.Module, Mode, tuple[Any, ...], Mapping[str, Any]], tuple[Captured, tuple[Replacement, ...]]
]

#: Captures and checks one more mode of a converted model.
CaptureMode = Callable[[Any], CapturedProgram]

Placement = tuple[torch.device, torch.dtype]


def placement_of(root: nn.Module) -> Placement | None:
    """Device and dtype of a model's first floating parameter; None where it has none."""
    return next(((p.device, p.dtype) for p in root.parameters() if p.is_floating_point()), None)


@dataclass
class Conversion:
    """The state of a converted model that is no module.

    Attributes:
        report: Streams, reads and blocks.
        failures: By mode, why there is no program.
        lowering: What is folded into the reads.
        typed: Whether dtypes are written into the graphs.
        own: The original's class and the Python around its forward, None where there is no Python of the original.
        guarded: By path, the submodules that raise when they are called by themselves, and the forward that was set on
            each, None where there was none.
        branches: Paths of the submodules that the root's own code calls for what it adds.
        recapture: Captures further kinds of calls, None where that cannot be done.
        reconfigure: Rewrites the programs for another config, None where there is no Python of the original.
        edits: Compares the tree with what the graphs hold of it.
        placement: Device and dtype that the parameters had when the programs were captured.
        tensors: Which tensors were one, and which were none, when the programs were captured.
        outdated: The modes whose programs were captured for another placement, or for other tensors.
        why_outdated: What changed, in words.
        programs: By mode, the program that was captured first.
        pickled: Says what a pickle of the model calls.
        deferred: The modes that are captured when they are first needed.
        further: By mode, the programs of other kinds of calls.
    """

    report: ConversionReport
    failures: dict[Mode, str]
    lowering: Lowering
    typed: bool
    own: OwnPython | None = None
    guarded: dict[str, Any] = field(default_factory=dict)
    branches: tuple[str, ...] = ()
    recapture: Recapture | None = None
    reconfigure: Callable[[Any, Any], None] | None = None
    edits: EditGuard | None = None
    placement: Placement | None = None
    tensors: TensorsAsCaptured = field(default_factory=TensorsAsCaptured)
    outdated: set[Mode] = field(default_factory=set)
    why_outdated: str = ""
    programs: dict[Mode, CapturedProgram] = field(default_factory=dict)
    pickled: Callable[[Any], tuple[Any, ...]] | None = None
    deferred: dict[Mode, CaptureMode] = field(default_factory=dict)
    further: dict[Mode, list[CapturedProgram]] = field(default_factory=dict)

    @property
    def signature(self) -> CallSignature:
        """The arguments of a call, as they were captured first."""
        return next(iter(self.programs.values())).signature

    @property
    def in_spec(self) -> Any:
        """Pytree of (args, kwargs), None where the graphs take them as they are."""
        return next(iter(self.programs.values())).in_spec

    @property
    def _kind(self) -> type[nn.Module] | None:
        """The original's class."""
        return self.own.kind if self.own is not None else None

    def guard_edits(self, root: nn.Module, original: nn.Module | None) -> None:
        """From now on compare the converted model's tree, and its original's numbers, at every call.

        Args:
            root: The converted model.
            original: What it was converted from, where that shares its weights.
        """
        self.edits = EditGuard(root, ADDED, original, self._kind)
        for programs in (self.programs.values(), *self.further.values()):
            for program in programs:
                self.edits.watch(root, program.watched if original is not None else self._as_now(root, program))

    def _as_now(self, root: nn.Module, program: CapturedProgram) -> tuple[WatchedValue, ...]:
        """What a program holds of a tree, told by the objects of a copy of the tree."""
        found = []
        for value in program.watched:
            module = root.get_submodule(value.module)
            now = value.now(module, self._kind if module is root else None)
            if value.aspect == "submodule" and not value.holds(module, root):
                continue  # in what a copy shares with the tree it was made of, as it does any function
            kept = value.aspect == "submodule" or isinstance(now, Library)
            found.append(value if kept else replace(value, value=now))
        return tuple(found)

    def watch_anew(self, root: nn.Module) -> None:
        """From now on compare the converted model's tree with what the programs that are left hold of it."""
        if self.edits is not None:
            programs = [*self.programs.values(), *(p for further in self.further.values() for p in further)]
            self.edits.watch_only(root, [v for p in programs for v in self._as_now(root, p)])

    def add(self, modes: Sequence[Mode], program: CapturedProgram) -> None:
        """One more program: the first of a mode, or for another kind of call than those before it."""
        for mode in modes:
            if mode in self.programs:
                self.further.setdefault(mode, []).append(program)
            else:
                self.programs[mode] = program

    def note_tensors(self, root: nn.Module) -> None:
        """Mark the programs that were captured for another placement than the model has now, or for other tensors.

        Raises:
            EditedError: Tensors that were one are two, or one that was None is there, and there is no Python to
                capture again.
        """
        changed = self.tensors.first_change(root)
        if changed and self.recapture is None:
            raise EditedError(
                f"{changed} at the conversion, which the graphs of this model do not see, and it holds no Python to "
                f"capture again: undo the change, or make it in the original and convert that."
            )
        if self.recapture is not None and self.placement != (now := placement_of(root)):
            self.placement, self.outdated = now, set(self.programs)
            self.why_outdated = f"its parameters are now {now}"
        if changed:
            self.outdated, self.why_outdated = set(self.programs), changed
            self.tensors = TensorsAsCaptured.of(root, ADDED)

    def capture_deferred(self, root: Any, mode: Mode) -> None:
        """Capture a mode that was left for later; where that fails, the reason is in `failures`.

        Raises:
            EditedError: The model was changed in a way that a capture does not see.
            CheckError: The program does not compute what the original computes.
        """
        if self.edits is not None:
            self.edits.check(root)
        self.note_tensors(root)
        try:
            program = self.deferred[mode](root)
        except CheckError:
            raise
        except AttnResError as error:
            self.failures[mode] = str(error)
            self.report.fail_mode(mode, str(error))
        else:
            self.programs[mode] = program
            self.report.add_mode(mode)
            if self.edits is not None:
                self.edits.watch(root, program.watched)
        del self.deferred[mode]

    def check_current(self, root: nn.Module) -> None:
        """Compare the converted model with what its programs were captured from, before they are written to a file.

        Raises:
            EditedError: The model was changed in a way that its programs do not see.
            SaveError: A program is to be captured again, which the next call does.
        """
        if self.edits is not None:
            self.edits.check(root)
        self.note_tensors(root)
        for mode in self.programs:
            why = self.edits.original_changed(mode) if self.edits is not None else ""
            if mode in self.outdated:
                why = self.why_outdated
            if why:
                raise SaveError(
                    f"the {mode} program is older than the model, because {why}: call the model once in {mode} mode, "
                    f"which captures it again, and save then."
                )
