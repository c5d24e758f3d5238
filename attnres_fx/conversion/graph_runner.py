"""A module that runs graphs: one program a mode, on the module's own parameters and buffers."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule

from attnres_fx.capture.isolated_run import Mode
from attnres_fx.errors import ModeError
from attnres_fx.passes.graph.copying import copy_graph, on_device
from attnres_fx.passes.graph.operations import hooked
from attnres_fx.passes.lowering.lower import Lowering, lower_
from attnres_fx.shown import brief

#: Type, eps, shape and parameters present of a norm module.
NormModule = tuple[type, float | None, tuple[int, ...], tuple[str, ...]] | None


@dataclass(frozen=True, eq=False)
class LoweredProgram:
    """A lowered copy of a program's graph. It finds its attributes on the module of the call, as the program does.

    Attributes:
        graph: the copy.
        call: generated code, `call(root, *inputs)`.
        passes: names of the passes that changed it.
        norms: modules whose norm was folded into a read, each with what it was when that was done.
        typed: whether the graph has dtypes written into it, so that it means under autocast what the program means.
    """

    graph: Graph
    call: Callable[..., Any]
    passes: tuple[str, ...]
    norms: tuple[tuple[str, NormModule], ...]
    typed: bool

    def fits(self, root: nn.Module) -> bool:
        """Whether it still computes what the program does: its norms are unchanged and no autocast is on."""
        if not self.typed and _autocasts():
            return False
        return all(_norm_module(root, path) == before for path, before in self.norms)


@dataclass(frozen=True, eq=False)
class Program:
    """One mode's graph and its generated code, which find their attributes on the module of the call.

    Attributes:
        graph: one mode's graph.
        call: generated code, `call(root, *inputs)`.
        lowered: what a module's forward runs, the same function with its reads lowered.
    """

    graph: Graph
    call: Callable[..., Any]
    lowered: LoweredProgram

    def run(self, root: nn.Module, *inputs: Any) -> Any:
        """The outputs of the graph, of its lowered form where that still fits."""
        return (self.lowered.call if self.lowered.fits(root) else self.call)(root, *inputs)

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # holds no tensors of a module


P = TypeVar("P", bound=Program)


class GraphRunner(nn.Module):
    """A module with one program a mode: `train()` and `eval()` choose it.

    A subclass sets `programs` and `lowering`, and runs the program of `mode` in its forward. Programs follow when the
    module is moved to another device; copies of the module share them.

    Attributes:
        programs: by mode.
        lowering: what is folded into the reads when a program runs.
        typed: whether the graphs have dtypes written into them.
    """

    programs: Mapping[Mode, Program]
    lowering: Lowering
    typed = True

    def __repr__(self) -> str:
        return brief(super().__repr__(), "see .report for the reads, .named_modules() for the tree")

    @property
    def mode(self) -> Mode:
        """The mode whose program runs."""
        return self._mode_now()

    def _mode_now(self) -> Mode:
        return "train" if self.training else "eval"

    def _state(self) -> Any:
        """What holds `programs`, `lowering` and `typed`."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Choose the train or the eval program.

        Raises:
            ModeError: that program was not captured; the module stays in its mode.
        """
        wanted: Mode = "train" if mode else "eval"
        try:
            self.program_of(wanted)
        except ModeError as error:
            raise ModeError(f"{error} It stays in {self._mode_now()} mode.") from error
        return super().train(mode)

    def program_of(self, mode: Mode) -> Program:
        """The program of a mode.

        Raises:
            ModeError: It was not captured.
        """
        if mode not in self.programs:
            raise ModeError(self._why_no_graph(mode))
        return self.programs[mode]

    def graph_module(self, mode: Mode | None = None, *, lowered: bool = False) -> GraphModule:
        """The program of a mode as a module on this module's own tensors; flat inputs.

        Args:
            mode: `"train"` or `"eval"`, by default the current one.
            lowered: the form that calls run, with norms and additions folded into the reads.

        Returns:
            A `torch.fx.GraphModule` with a copy of the graph.

        Raises:
            ModeError: that program was not captured.
        """
        program = self.program_of(mode or self._mode_now())
        return GraphModule(self, copy_graph(program.lowered.graph if lowered else program.graph))

    def _why_no_graph(self, mode: Mode) -> str:
        return f"this module has no {mode} graph: capture the model in {mode} mode too."

    def _program(self, graph: Graph, training: bool) -> Program:
        """Generated code for a graph whose attributes are on this module; the graph releases its tensors."""
        call = type(GraphModule(self, graph)).forward
        lowered = self._lowered(graph, training)
        _forget_tensors(graph)
        return Program(graph, call, lowered)

    def _lowered(self, graph: Graph, training: bool) -> LoweredProgram:
        gm = GraphModule(self, copy_graph(graph))
        results = lower_(gm, self._state().lowering, training=training)
        paths = dict.fromkeys(path for r in results for f in r.replaced for path in getattr(f, "modules", ()))
        _forget_tensors(gm.graph)
        return LoweredProgram(
            gm.graph,
            type(gm).forward,
            tuple(str(r) for r in results if r.modified),
            tuple((path, _norm_module(self, path)) for path in paths),
            self._state().typed,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves its graphs along: what they make on the device they were captured on is made on the new one."""
        before = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        super()._apply(fn, recurse)
        after = fn(torch.empty(0, device=before)).device
        if after != before:
            state = self._state()
            trained = state.programs.get("train")
            moved = {id(p): self._moved(p, after, p is trained) for p in state.programs.values()}
            state.programs = {mode: moved[id(p)] for mode, p in state.programs.items()}
        return self

    def _moved(self, program: P, device: torch.device, training: bool) -> P:
        graph = on_device(program.graph, device)
        if graph is None:
            return program
        here = self._program(graph, training)
        return replace(program, graph=here.graph, call=here.call, lowered=here.lowered)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def _norm_module(root: nn.Module, path: str) -> NormModule:
    """What a norm module computes; None where it is no plain norm, or does more when it is called."""
    module: Any = root.get_submodule(path)
    if type(module) not in (nn.LayerNorm, nn.RMSNorm) or hooked(module):
        return None
    present = tuple(name for name, value in module._parameters.items() if value is not None)
    return type(module), module.eps, tuple(module.normalized_shape), present


def _autocasts() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _forget_tensors(graph: Graph) -> None:
    """Release the tensors that a graph was made on, so that a copy of the module does not hold the original's."""
    graph.owning_module = None
    for node in graph.nodes:
        if node.op == "get_attr" and not isinstance(node.meta.get("val"), FakeTensor):
            node.meta.pop("val", None)
