"""The module a conversion returns: the original's parameters, the new ones, and one program a mode."""

import inspect
import io
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Self

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from attnres_fx.capture.captured import CapturedGraph
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.signature import CallSignature
from attnres_fx.conversion.captured_program import CapturedProgram, flat_arguments
from attnres_fx.conversion.files import ModelParts, load_parts, save_parts
from attnres_fx.conversion.graph_runner import GraphRunner
from attnres_fx.conversion.report import ConversionReport
from attnres_fx.errors import RewriteError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes.graph.copying import copy_graph
from attnres_fx.passes.lowering.lower import Lowering
from attnres_fx.passes.rewrite.depth_attention import Replacement

CONSTANTS = "_captured"


class ConvertedModel(GraphRunner):
    """A model whose residual streams are read by attention over depth.

    Call it with the arguments it was captured with, by position or keyword; it returns what the original returns.
    Made by `convert` and by `load`.

    Attributes:
        attnres: the added parameters, one `DepthRead` per read.
        report: the streams, their reads and blocks, and what was left alone.
        programs: by mode, the program that a call runs.
        failures: by mode, why there is no program.
        signature: the arguments of a call.
        in_spec: pytree of (args, kwargs), None where the graphs take them as they are.
    """

    attnres: AttnResParameters
    report: ConversionReport
    programs: dict[Mode, CapturedProgram]

    def __init__(
        self,
        root: nn.Module,
        attnres: AttnResParameters,
        graphs: Mapping[Mode, tuple[CapturedGraph, tuple[Replacement, ...]]],
        failures: Mapping[Mode, str],
        signature: CallSignature,
        in_spec: Any,
        report: ConversionReport,
        lowering: Lowering | None = None,
    ) -> None:
        super().__init__()
        for store in ("_parameters", "_buffers", "_modules"):
            getattr(self, store).update(getattr(root, store))
        self._non_persistent_buffers_set |= root._non_persistent_buffers_set
        self.attnres = attnres
        self.report = report
        self.signature = signature
        self.in_spec = in_spec
        self.failures = dict(failures)
        self.lowering = lowering or Lowering()
        self.typed = in_spec is not None
        by_graph: dict[int, CapturedProgram] = {}  # modes may share a graph
        programs = {}
        trained = {id(graph) for mode, (graph, _) in graphs.items() if mode == "train"}
        for mode, (graph, replacements) in graphs.items():
            if id(graph) not in by_graph:
                by_graph[id(graph)] = self._captured_program(mode, graph, replacements, id(graph) in trained)
            programs[mode] = by_graph[id(graph)]
        self.programs = programs
        self.__class__ = _with_signature(signature)

    def _captured_program(
        self, mode: Mode, captured: CapturedGraph, replacements: tuple[Replacement, ...], training: bool
    ) -> CapturedProgram:
        gm = captured.gm
        for node in gm.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                node.target = self._adopt(gm, str(node.target), mode)
        program = self._program(gm.graph, training)
        return CapturedProgram(
            program.graph,
            program.call,
            program.lowered,
            captured.out_spec,
            captured.shapes,
            captured.ranges,
            replacements,
            captured.guards,
        )

    def _adopt(self, gm: GraphModule, target: str, mode: Mode) -> str:
        """Where this module keeps an attribute of a captured graph; constants get a place of their own."""
        value = attrgetter(target)(gm)
        try:
            own = attrgetter(target)(self)
        except AttributeError:
            own = None
        if own is value or (isinstance(own, nn.Module) and isinstance(value, nn.Module)):
            return target
        if CONSTANTS not in self._modules:
            self.add_module(CONSTANTS, nn.Module())
        store = self._modules[CONSTANTS]
        assert store is not None
        name = f"{mode}_{target.replace('.', '_')}"
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            store.register_buffer(name, value, persistent=False)
        else:
            setattr(store, name, value)
        return f"{CONSTANTS}.{name}"

    def _why_no_graph(self, mode: Mode) -> str:
        return f"this model has no {mode} graph: {self.failures.get(mode, 'it was not captured')}."

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program = self.programs[self.mode]
        outputs = program.run(self, *self.flatten_arguments(*args, **kwargs))
        if program.out_spec is None:
            return outputs
        return pytree.tree_unflatten(outputs, program.out_spec)

    def flatten_arguments(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The arguments of a call as the flat inputs of the current mode's program.

        Args:
            *args: of the call, by position.
            **kwargs: of the call, by keyword.

        Returns:
            One value per input of the program, in order.

        Raises:
            ArgumentError: they do not fit what was captured.
        """
        return flat_arguments(self.programs[self.mode], self.signature, self.in_spec, args, kwargs)

    def replacements(self, mode: Mode | None = None) -> tuple[Replacement, ...]:
        """The depth-attention nodes of a mode's graph.

        Args:
            mode: `"train"` or `"eval"`, by default the current one.

        Returns:
            One entry per read, in execution order.
        """
        return self.programs[mode or self.mode].replacements

    def captured(self, mode: Mode) -> CapturedGraph:
        """A copy of a mode's graph as a capture returns it, on this model's own tensors.

        Args:
            mode: `"train"` or `"eval"`.
        """
        program = self.programs[mode]
        gm = GraphModule(self, copy_graph(program.graph))
        return CapturedGraph(gm, program.out_spec, program.shapes, dict(program.ranges), program.guards)

    def save(self, path: Any) -> None:
        """Write programs of both modes, weights, config and report to a file for `attnres_fx.load`.

        Args:
            path: a path, or a binary file to write to.

        Raises:
            SaveError: something of the model cannot be written.
        """
        save_parts(self._parts(), path)

    def _parts(self) -> ModelParts:
        captured: dict[int, CapturedGraph] = {}
        for mode, program in self.programs.items():
            if id(program) not in captured:
                captured[id(program)] = self.captured(mode)
        return ModelParts(
            root=self,
            attnres=self.attnres,
            graphs={m: (captured[id(p)], p.replacements) for m, p in self.programs.items()},
            failures=self.failures,
            signature=self.signature,
            in_spec=self.in_spec,
            report=self.report,
            lowering=self.lowering,
            training=self.training,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves as any module does, but keeps its dtypes: the captured graphs have theirs written into them."""
        captured = self.parameters() if self.in_spec is not None else ()
        for dtype in {p.dtype for p in captured if p.is_floating_point()}:
            if (wanted := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise RewriteError(
                    f"a converted model cannot change from {dtype} to {wanted}: its graphs were captured in {dtype}. "
                    f"Cast the original model and convert it again; load_state_dict carries the weights over."
                )
        return super()._apply(fn, recurse)

    def __reduce__(self) -> Any:
        """Pickled as `save` writes it, so that `torch.save` and processes can carry it."""
        file = io.BytesIO()
        self.save(file)
        return _from_bytes, (file.getvalue(),)

    def extra_repr(self) -> str:
        return f"{self.signature}, modes={'/'.join(self.programs)}"


def load(path: Any, *, map_location: Any = None) -> ConvertedModel:
    """Read a model that `ConvertedModel.save` wrote.

    Args:
        path: a path, or a binary file to read from.
        map_location: where the weights go, as for `torch.load`.

    Returns:
        The model, in the mode in which it was written.

    Raises:
        SaveError: the file is no such model, or one of another format.
    """
    parts = load_parts(path, map_location=map_location)
    converted = ConvertedModel(
        parts.root,
        parts.attnres,
        parts.graphs,
        parts.failures,
        parts.signature,
        parts.in_spec,
        parts.report,
        parts.lowering,
    )
    nn.Module.train(converted, parts.training)
    return converted


def _from_bytes(data: bytes) -> ConvertedModel:
    """The model of a pickle."""
    return load(io.BytesIO(data))


def _with_signature(signature: CallSignature) -> type[ConvertedModel]:
    """ConvertedModel whose `forward` shows the captured arguments to whoever inspects it (export, trainers)."""

    def forward(self: ConvertedModel, *args: Any, **kwargs: Any) -> Any:
        return ConvertedModel.forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = signature.to_inspect()
    forward.__signature__ = shown.replace(parameters=[own, *shown.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = f"The original's forward, with the arguments it was captured with: {signature}."
    return type("ConvertedModel", (ConvertedModel,), {"forward": forward, "__module__": __name__})
