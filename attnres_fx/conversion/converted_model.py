"""The module a conversion returns: the original's modules, the new parameters, and the programs of its calls."""

import contextlib
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from attnres_fx.capture.captured import CapturedGraph
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.recorder import CAPTURE_LOCK
from attnres_fx.capture.signature import CallSignature
from attnres_fx.conversion.calls import program_for
from attnres_fx.conversion.captured_program import (
    CapturedProgram,
    captured_graph,
    flat_arguments,
    run_program,
)
from attnres_fx.conversion.conversion import ADDED, Conversion, placement_of
from attnres_fx.conversion.files import parts_of, save_parts
from attnres_fx.conversion.graph_runner import GraphRunner
from attnres_fx.conversion.report import ConversionReport
from attnres_fx.errors import ModeError, RewriteError
from attnres_fx.parameters import AttnResParameters, check_state
from attnres_fx.passes.lowering.lower import Lowering
from attnres_fx.passes.rewrite.execution import Replacement


class ConvertedModel(GraphRunner):
    """A model whose residual streams are read by attention over depth.

    Made by `convert`: a clone of the original's module tree that shares its tensors, an instance of the original's
    class, whose forward runs captured programs. Made by `load`, or from a graph: bare modules that hold the tensors.

    Attributes:
        attnres: The added parameters, one `DepthRead` per read.
    """

    attnres: AttnResParameters
    _attnres_conversion: Conversion

    @property
    def report(self) -> ConversionReport:
        """The streams, their reads and blocks, and what was left alone."""
        return self._attnres_conversion.report

    @property  # type: ignore[override]
    def programs(self) -> dict[Mode, CapturedProgram]:
        """By mode, the program that was captured first; without the modes that were not needed yet."""
        return self._attnres_conversion.programs

    @programs.setter
    def programs(self, programs: dict[Mode, CapturedProgram]) -> None:
        self._attnres_conversion.programs = programs

    def _state(self) -> Conversion:
        return self._attnres_conversion

    def program_of(self, mode: Mode) -> CapturedProgram:
        """The program of a mode, captured now where the conversion left it for later.

        Args:
            mode: `"train"` or `"eval"`.

        Returns:
            The program that was captured first for this mode.

        Raises:
            ModeError: The mode cannot be captured; the reason is given.
            EditedError: The model was changed in a way that a capture does not see.
            CheckError: The program does not compute what the original computes.
        """
        conversion = self._attnres_conversion
        if mode in conversion.deferred:
            with CAPTURE_LOCK:
                if mode in conversion.deferred:
                    conversion.capture_deferred(self, mode)
        if mode not in conversion.programs:
            raise ModeError(self._why_no_graph(mode))
        return conversion.programs[mode]

    def every_program(self) -> dict[Mode, CapturedProgram]:
        """Capture what was left for later.

        Returns:
            By mode, the program that was captured first; without the modes that cannot be captured.
        """
        for mode in tuple(self._attnres_conversion.deferred):
            with contextlib.suppress(ModeError):  # the reason is in `failures`
                self.program_of(mode)
        return self._attnres_conversion.programs

    @property
    def failures(self) -> dict[Mode, str]:
        """By mode, why there is no program."""
        return self._attnres_conversion.failures

    @property
    def signature(self) -> CallSignature:
        """The arguments of a call, as they were captured first."""
        return self._attnres_conversion.signature

    @property
    def in_spec(self) -> Any:
        """Pytree of (args, kwargs), None where the graphs take them as they are."""
        return self._attnres_conversion.in_spec

    @property
    def lowering(self) -> Lowering:  # type: ignore[override]
        """What is folded into the reads."""
        return self._attnres_conversion.lowering

    @property
    def typed(self) -> bool:  # type: ignore[override]
        """Whether dtypes are written into the graphs, so that they cannot be cast."""
        return self._attnres_conversion.typed

    def _why_no_graph(self, mode: Mode) -> str:
        why = self._attnres_conversion.failures.get(mode, "it was not captured")
        return f"this model has no {mode} graph: {why.rstrip('.')}."

    __call__ = nn.Module.__call__  # a class's own is part of its graphs
    _call_impl = nn.Module._call_impl

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original computes, with its residual streams read by attention over depth.

        Args:
            *args: As for the original, by position.
            **kwargs: As for the original, by keyword.

        Returns:
            What the original returns: the same structure, shapes and dtypes.

        Raises:
            ArgumentError: The call fits no program, and cannot be captured.
            EditedError: The model was changed in a way that its programs do not see.
        """
        program, inputs = program_for(self, args, kwargs)
        return run_program(program, self, inputs)

    def original(self, *, hooks: bool = False) -> nn.Module:
        """A clone of the tree with the original's class and forward, on the same tensors.

        Args:
            hooks: Whether it has the hooks too that fire around the programs, on the model itself.

        Returns:
            The model as it was before the conversion, without `attnres`.

        Raises:
            RewriteError: The model holds no Python of the original: it was made from a graph, or loaded.
        """
        conversion = self._attnres_conversion
        if conversion.own is None:
            raise RewriteError("this converted model holds no code of its original: it was made from a graph.")
        root = conversion.own.original_of(self, conversion.guarded, hooks=hooks)
        del root.__dict__["_attnres_conversion"]
        for added in ADDED:
            root._modules.pop(added, None)
        return root

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with tensors of its own, which runs the same programs."""
        conversion = self._attnres_conversion
        if conversion.edits is not None:
            conversion.edits.check(self)
        copied = super().__deepcopy__(memo)
        if conversion.own is not None:
            modules = {id(m): memo[id(m)] for m in self.modules() if id(m) in memo}
            copied._attnres_conversion.own = conversion.own.on(modules)
        if conversion.edits is not None:
            copied._attnres_conversion.guard_edits(copied, None)
        return copied

    def flatten_arguments(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The arguments of a call as the flat inputs of the current mode's program.

        Args:
            *args: Of the call, by position.
            **kwargs: Of the call, by keyword.

        Returns:
            One value per input of the program, in order.

        Raises:
            ArgumentError: They do not fit what was captured.
        """
        return flat_arguments(self.program_of(self._mode_now()), args, kwargs)

    def replacements(self, mode: Mode | None = None) -> tuple[Replacement, ...]:
        """The depth-attention nodes of a mode's graph.

        Args:
            mode: `"train"` or `"eval"`, by default the current one.

        Returns:
            One entry per read, in execution order.
        """
        return self.program_of(mode or self._mode_now()).replacements

    def captured(self, mode: Mode) -> CapturedGraph:
        """A copy of a mode's graph as a capture returns it, on this model's own tensors.

        Args:
            mode: `"train"` or `"eval"`.

        Returns:
            The graph, free to be changed.
        """
        return captured_graph(self, self.program_of(mode))

    def save(self, path: Any) -> None:
        """Write programs of both modes, weights, config and report to a file for `attnres_fx.load`.

        The file is data alone. It is written whole or not at all: what was there before stays until then. A train
        program that holds something which no file can hold is left out, and the report in the file says so.

        Args:
            path: A path, or a binary file to write to.

        Raises:
            SaveError: Something of the model cannot be written.
        """
        save_parts(parts_of(self), path)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts as any module does, as far as its graphs can follow."""
        before = {p.dtype for p in self.parameters() if p.is_floating_point()}
        cast = {d: to for d in before if (to := fn(torch.empty(0, dtype=d)).dtype) != d}
        conversion = self._attnres_conversion
        if cast and conversion.typed and conversion.recapture is None:
            dtype, wanted = next(iter(cast.items()))
            raise RewriteError(
                f"this converted model cannot change from {dtype} to {wanted}: its graphs were captured in {dtype}, "
                f"and it holds no Python to capture again. Cast the original model and convert it again; "
                f"load_state_dict carries the weights over."
            )
        super()._apply(fn, recurse)
        if not cast and conversion.placement is not None:  # the graphs were moved along
            conversion.placement = placement_of(self)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Loads as any module does, after it compared the config: of a state with another config nothing is loaded."""
        check_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce__(self) -> Any:
        """Pickled as its original, which is converted again when it is loaded; as a file where there is none."""
        conversion = self._attnres_conversion
        if conversion.edits is not None:
            conversion.edits.check(self)
        assert conversion.pickled is not None
        return conversion.pickled(self)

    def extra_repr(self) -> str:
        conversion = self._attnres_conversion
        return f"{conversion.signature}, modes={'/'.join((*conversion.programs, *conversion.deferred))}"
