"""A stage as a module, and all stages of a model together."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, overload

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

from attnres_fx.errors import ModeError, PlanError
from attnres_fx.partition.split.input_sizes import concrete_shape, sizes_for
from attnres_fx.partition.split.routes import StageRoute, StageValue
from attnres_fx.partition.split.stage_graphs import Split, StageProgram
from attnres_fx.passes.graph.nodes import on_device, tensor_of
from attnres_fx.passes.lowering.lower import Lowering, lower_
from attnres_fx.passes.normalize.inline_regions import getattr_path

Mode = Literal["train", "eval"]


@dataclass(frozen=True, eq=False)
class _Runnable:
    """parts: the same as graphs of single sublayers, where these are run again in backward."""

    program: StageProgram
    call: Callable[..., Any]
    parts: tuple["_Runnable", ...] = ()

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # holds no tensors: attributes are found on the stage of the call


class Stage(GraphModule):
    """One virtual stage: `stage(*values, *inputs)`, in the order of `route.takes` and of `inputs`.

    Returns the values of `route.produced` as a tuple; the last stage returns the model's flat outputs. Holds the
    parameters it uses under the names they have in the converted model. `train()` and `eval()` choose the graph.
    """

    index: int
    programs: dict[Mode, _Runnable]

    def __init__(
        self,
        roots: Sequence[nn.Module],
        index: int,
        programs: Mapping[Mode, StageProgram],
        lowering: Lowering | None = None,
        parts: Mapping[Mode, Sequence[StageProgram]] | None = None,
    ) -> None:
        """roots: where the graphs' attributes are found, in the first that has each.

        parts: graphs of single sublayers, where these keep only their inputs and run again in backward.
        """
        graphs = {mode: p.graph for mode, p in programs.items()}
        first: Mode = "train" if "train" in graphs else "eval"
        super().__init__(nn.Module(), Graph(), class_name="Stage")
        _take_attributes(self, roots, graphs.values())
        self.index = index
        self.lowering = lowering or Lowering()
        self.graph = graphs[first]
        self.programs = {
            mode: self._runnable(p, mode, lowering or Lowering(), (parts or {}).get(mode, ()))
            for mode, p in programs.items()
        }
        type(self).forward = _forward  # type: ignore[method-assign]
        for graph in graphs.values():
            _forget_real_values(graph)
        nn.Module.train(self, first == "train")

    def _runnable(
        self, program: StageProgram, mode: Mode, lowering: Lowering, parts: Sequence[StageProgram] = ()
    ) -> _Runnable:
        call = _lowered(self, program.graph, lowering, mode == "train")
        return _Runnable(program, call, tuple(self._runnable(p, mode, lowering) for p in parts))

    @property
    def recomputes(self) -> bool:
        """Whether its sublayers keep only their inputs in training and run again in backward."""
        return any(p.parts for p in self.programs.values())

    @property
    def mode(self) -> Mode:
        return "train" if self.training else "eval"

    @property
    def route(self) -> StageRoute:
        return self.programs[self.mode].program.route

    @property
    def inputs(self) -> tuple[int, ...]:
        """Which of the model's flat inputs it takes."""
        return self.programs[self.mode].program.inputs

    def train(self, mode: bool = True) -> Self:
        """Choose the train or the eval graph. Raises ModeError where that one was not captured."""
        wanted: Mode = "train" if mode else "eval"
        if hasattr(self, "programs") and wanted not in self.programs:
            raise ModeError(f"stage {self.index} has no {wanted} graph: capture the model in {wanted} mode too.")
        return super().train(mode)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """Memory without values, as `nn.Module.to_empty`.

        What a conversion adds starts as it does there: queries and gates 0, key gains 1. Buffers that no checkpoint
        holds (rotary tables, constants of the graph) are made NaN, and named in a warning: whoever forgets to set them
        must not get numbers.
        """
        kept = set(self.state_dict())
        unsaved = [name for name, buffer in self.named_buffers() if buffer.is_meta and name not in kept]
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

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves its graphs along: what they make on the device they were captured on is made on the new one."""
        before = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        super()._apply(fn, recurse)
        after = fn(torch.empty(0, device=before)).device
        if after != before:
            self.programs = {mode: self._moved(p, mode, after) for mode, p in self.programs.items()}
        return self

    def _moved(self, runnable: _Runnable, mode: Mode, device: torch.device) -> _Runnable:
        parts = tuple(self._moved(p, mode, device) for p in runnable.parts)
        graph = on_device(runnable.program.graph, device)
        if graph is None:
            return replace(runnable, parts=parts)
        graph.owning_module = None
        program = replace(runnable.program, graph=graph)
        return _Runnable(program, _lowered(self, graph, self.lowering, mode == "train"), parts)

    def graph_module(self, mode: Mode | None = None) -> GraphModule:
        """A mode's graph, with its reads as they were put in, as a module on this stage's own tensors."""
        return GraphModule(self, copy.deepcopy(self.programs[mode or self.mode].program.graph))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        type(copied).forward = _forward  # type: ignore[method-assign]
        return copied


def _forward(self: Stage, *args: Any) -> Any:
    runnable = self.programs["train" if self.training else "eval"]
    if runnable.parts and torch.is_grad_enabled():
        return _recomputing(self, runnable, args)
    return runnable.call(self, *args)


def _recomputing(stage: Stage, runnable: _Runnable, args: tuple[Any, ...]) -> Any:
    """Sublayer by sublayer, each keeping its inputs alone."""
    program = runnable.program
    names = program.route.takes
    held = dict(zip(names, args[: len(names)], strict=True))
    inputs = dict(zip(program.inputs, args[len(names) :], strict=True))
    outputs: Any = ()
    for part in runnable.parts:
        taken = [held[n] for n in part.program.route.takes] + [inputs[i] for i in part.program.inputs]
        outputs = checkpoint(part.call, stage, *taken, use_reentrant=False)
        if part is not runnable.parts[-1] or program.route.produced:
            held.update(zip(part.program.route.produced, outputs, strict=False))
    return tuple(held[n] for n in program.route.produced) if program.route.produced else outputs


def _lowered(stage: Stage, graph: Graph, lowering: Lowering, training: bool) -> Callable[..., Any]:
    gm = GraphModule(stage, copy.deepcopy(graph))
    lower_(gm, lowering, training=training)
    return type(gm).forward


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
        getattr_path(root, target)
    except AttributeError:
        return False
    return True


def _forget_real_values(graph: Graph) -> None:
    graph.owning_module = None
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta.pop("val", None)


class Stages(Sequence[Stage]):
    """The virtual stages of a model in order, and what they have in common.

    num_stages: ranks P; virtual_stages: V; stage c runs on rank c mod P. tied: groups of (stage, parameter name)
    that are one and the same parameter. cache: whether the stages of a rank share what they have seen.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        splits: Mapping[Mode, Split],
        *,
        num_stages: int,
        virtual_stages: int,
        cache: bool = True,
        flatten: Callable[[Mode, tuple[Any, ...], Mapping[str, Any]], list[Any]],
        unflatten: Callable[[Mode, Any], Any],
    ) -> None:
        self._stages = tuple(stages)
        self._splits = dict(splits)
        self.num_stages = num_stages
        self.virtual_stages = virtual_stages
        self.cache = cache
        self._flatten = flatten
        self._unflatten = unflatten
        self.tied = _tied(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    @overload
    def __getitem__(self, index: int) -> Stage: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Stage, ...]: ...
    def __getitem__(self, index: int | slice) -> Stage | tuple[Stage, ...]:
        return self._stages[index]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    def of_rank(self, rank: int) -> tuple[Stage, ...]:
        """The stages a rank runs, in order."""
        if not 0 <= rank < self.num_stages:
            raise PlanError(f"there is no rank {rank}: the plan has {self.num_stages}.")
        return self._stages[rank :: self.num_stages]

    @property
    def mode(self) -> Mode:
        return self._stages[0].mode

    @property
    def values(self) -> tuple[StageValue, ...]:
        """What travels between stages in the current mode, in the order in which it is made."""
        return self._splits[self.mode].values

    def shapes(self, inputs: Sequence[Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every value that travels, for a microbatch's flat inputs."""
        split = self._splits[self.mode]
        nodes = [n for n in split.chain.graph.nodes if n.op == "placeholder"]
        sizes = sizes_for(split.symbols, dict(zip(nodes, inputs, strict=True)))
        found = {}
        for name, node in split.nodes.items():
            value = tensor_of(node)
            assert value is not None
            found[name] = (concrete_shape(value, sizes), value.dtype)
        return found

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """A call's arguments as the model's flat inputs."""
        return self._flatten(self.mode, args, kwargs)

    def unflatten(self, outputs: Any) -> Any:
        """The last stage's outputs as the model returns them."""
        return self._unflatten(self.mode, outputs)

    def train(self, mode: bool = True) -> Self:
        for stage in self._stages:
            stage.train(mode)
        return self

    def eval(self) -> Self:
        return self.train(False)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """All stages one after another in this process: what the pipeline computes, for comparisons."""
        leaves = self.flatten(args, kwargs)
        held: dict[str, Any] = {}
        outputs: Any = ()
        for stage in self._stages:
            taken = [held[name] for name in stage.route.takes]
            outputs = stage(*taken, *(leaves[i] for i in stage.inputs))
            if stage is not self._stages[-1]:
                held.update(zip(stage.route.produced, outputs, strict=True))
        return self.unflatten(outputs)


def _tied(stages: Sequence[Stage]) -> tuple[tuple[tuple[int, str], ...], ...]:
    places: dict[int, list[tuple[int, str]]] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            places.setdefault(id(parameter), []).append((stage.index, name))
    return tuple(tuple(group) for group in places.values() if len(group) > 1)
