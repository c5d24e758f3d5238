"""One virtual stage as a module that holds the parameters it uses."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Self

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

from attnres_fx.capture.isolated_run import Mode
from attnres_fx.conversion.graph_runner import GraphRunner, P, Program
from attnres_fx.partition.split.routes import StageRoute
from attnres_fx.partition.split.stage_graphs import StageGraph
from attnres_fx.passes.graph.copying import copy_graph
from attnres_fx.passes.lowering.lower import Lowering


@dataclass(frozen=True, eq=False)
class StageProgram(Program):
    """One mode's program of a stage, with what it takes and returns.

    Args:
        route: Which values it takes and produces.
        inputs: Which of the model's flat inputs it takes.
        parts: The same as programs of single sublayers, where these are run again in backward.
    """

    route: StageRoute
    inputs: tuple[int, ...]
    parts: tuple["StageProgram", ...] = ()


class Stage(GraphRunner, GraphModule):
    """One virtual stage: `stage(*values, *inputs)`, in the order of `route.takes` and of `inputs`.

    Returns the values of `route.produced` as a tuple; the last stage returns the model's flat outputs. Holds the
    parameters it uses under the names they have in the converted model. `train()` and `eval()` choose the graph.

    Attributes:
        index: which virtual stage it is, from 0.
        programs: by mode, what it computes.
    """

    index: int
    programs: Mapping[Mode, StageProgram]

    def __init__(
        self,
        roots: Sequence[nn.Module],
        index: int,
        graphs: Mapping[Mode, StageGraph],
        lowering: Lowering | None = None,
        parts: Mapping[Mode, Sequence[StageGraph]] | None = None,
    ) -> None:
        """A stage of its graphs.

        Args:
            roots: where the graphs' attributes are found, in the first that has each.
            index: which virtual stage it is, from 0.
            graphs: by mode.
            lowering: how the reads are lowered, Lowering() by default.
            parts: graphs of single sublayers, where these keep only their inputs and run again in backward.
        """
        first: Mode = "train" if "train" in graphs else "eval"
        super().__init__(nn.Module(), Graph(), class_name="Stage")
        _take_attributes(self, roots, [g.graph for g in graphs.values()])
        self.index = index
        self.lowering = lowering or Lowering()
        self.programs = {m: self._stage_program(g, m == "train", (parts or {}).get(m, ())) for m, g in graphs.items()}
        self.graph = self.programs[first].graph
        self.graph.owning_module = None
        type(self).forward = _forward  # type: ignore[method-assign]
        nn.Module.train(self, first == "train")

    def _stage_program(self, graph: StageGraph, training: bool, parts: Sequence[StageGraph] = ()) -> StageProgram:
        program = self._program(copy_graph(graph.graph), training)  # modes may share a graph
        sublayers = tuple(self._stage_program(p, training) for p in parts)
        return StageProgram(program.graph, program.call, program.lowered, graph.route, graph.inputs, sublayers)

    def _why_no_graph(self, mode: Mode) -> str:
        return f"stage {self.index} has no {mode} graph: capture the model in {mode} mode too."

    @property
    def route(self) -> StageRoute:
        """The values it takes and produces, in the current mode."""
        return self.programs[self.mode].route

    @property
    def inputs(self) -> tuple[int, ...]:
        """Which of the model's flat inputs it takes."""
        return self.programs[self.mode].inputs

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """Memory without values, as `nn.Module.to_empty`.

        What a conversion adds starts as it does there: queries and gates 0, key gains 1. Buffers that no checkpoint
        holds (rotary tables, constants of the graph) are made NaN, and named in a warning: whoever forgets to set them
        must not get numbers.

        Args:
            device: where the memory is.
            recurse: also of submodules.

        Returns:
            The stage itself.
        """
        saved = set(self.state_dict())
        unsaved = [name for name, buffer in self.named_buffers() if buffer.is_meta and name not in saved]
        super().to_empty(device=device, recurse=recurse)
        for name, parameter in self.named_parameters():
            if name.startswith("attnres."):  # as a conversion makes them, for weights of a model that has none
                nn.init.constant_(parameter, float(name.endswith(".key_weight")))
        for name in unsaved:
            buffer = self.get_buffer(name)
            buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)
        if unsaved:
            warnings.warn(
                f"stage {self.index} has buffers that no checkpoint holds ({', '.join(unsaved)}): set them, or build "
                f"the model with its parameters on `meta` and its buffers on a device.",
                stacklevel=2,
            )
        return self

    def _moved(self, program: P, device: torch.device, training: bool) -> P:
        moved = super()._moved(program, device, training)
        assert isinstance(moved, StageProgram)
        return replace(moved, parts=tuple(self._moved(p, device, training) for p in moved.parts))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = super().__deepcopy__(memo)
        type(copied).forward = _forward  # type: ignore[method-assign]
        return copied


def _forward(self: Stage, *args: Any) -> Any:
    program = self.programs[self.mode]
    if program.parts and torch.is_grad_enabled():
        return _recomputing(self, program, args)
    return program.run(self, *args)


def _recomputing(stage: Stage, program: StageProgram, args: tuple[Any, ...]) -> Any:
    """Sublayer by sublayer, each keeping its inputs alone."""
    names = program.route.takes
    values = dict(zip(names, args[: len(names)], strict=True))
    inputs = dict(zip(program.inputs, args[len(names) :], strict=True))
    outputs: Any = ()
    for part in program.parts:
        taken = [values[n] for n in part.route.takes] + [inputs[i] for i in part.inputs]
        outputs = checkpoint(part.run, stage, *taken, use_reentrant=False)
        if part is not program.parts[-1] or program.route.produced:
            values.update(zip(part.route.produced, outputs, strict=False))
    return tuple(values[n] for n in program.route.produced) if program.route.produced else outputs


def _take_attributes(stage: nn.Module, roots: Sequence[nn.Module], graphs: Iterable[Graph]) -> None:
    """Put what the graphs name on the stage, at the paths it has on its root; persistent as there."""
    for target in dict.fromkeys(str(n.target) for g in graphs for n in g.nodes if n.op == "get_attr"):
        root = next((r for r in roots if _has(r, target)), roots[-1])
        *path, leaf = target.split(".")
        holder, there = stage, root
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder, there = getattr(holder, part), getattr(there, part)
        value = getattr(there, leaf)
        if isinstance(value, nn.Parameter):
            holder.register_parameter(leaf, value)
        elif isinstance(value, torch.Tensor):
            holder.register_buffer(leaf, value, persistent=leaf not in there._non_persistent_buffers_set)
        else:
            setattr(holder, leaf, value)


def _has(root: nn.Module, target: str) -> bool:
    try:
        attrgetter(target)(root)
    except AttributeError:
        return False
    return True
