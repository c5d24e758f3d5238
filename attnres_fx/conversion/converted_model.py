"""The module a conversion returns: the original's parameters, the new ones, and one program a mode."""

import copy
import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.programs import CapturedGraph
from attnres_fx.capture.signature import CallSignature, InputShape, check_shapes
from attnres_fx.capture.sizes import Guards
from attnres_fx.conversion.report import ConversionReport
from attnres_fx.errors import ArgumentError, ModeError, RewriteError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes.graph.nodes import on_device
from attnres_fx.passes.lowering.lower import Lowering, lower_
from attnres_fx.passes.lowering.norms import hooked
from attnres_fx.passes.normalize.inline_regions import getattr_path
from attnres_fx.passes.rewrite.depth_attention import Replacement

CONSTANTS = "_captured"


#: Type, eps, shape and parameters present of a norm module.
NormModule = tuple[type, float | None, tuple[int, ...], tuple[str, ...]] | None


@dataclass(frozen=True, eq=False)
class Program:
    """One mode's graph, run on whatever module holds its attributes.

    call: generated code, `call(root, *flat_inputs)`. replacements: the reads that were put in.
    lowered: what a model's forward runs, the same function with its reads lowered.
    """

    graph: Graph
    call: Callable[..., Any]
    lowered: "LoweredProgram"
    out_spec: Any
    shapes: tuple[InputShape | None, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    replacements: tuple[Replacement, ...]
    guards: Guards | None = None

    def __deepcopy__(self, memo: Any) -> "Program":
        return self  # holds no tensors of a model; attributes are found on the root of the call


@dataclass(frozen=True, eq=False)
class LoweredProgram:
    """A lowered copy of a program's graph: on the same attributes, so it holds no tensors either.

    norms: modules whose norm was folded into a read, each with what it was when that was done. typed: whether the
    graph has dtypes written into it, so that it means under autocast what the program means.
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


class ConvertedModel(nn.Module):
    """A model whose residual streams are read by attention over depth.

    Call it with the arguments it was captured with, by position or keyword; it returns what the original
    returns. `attnres` holds the added parameters, `report` what was found and changed.
    """

    attnres: AttnResParameters
    report: ConversionReport

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
        made: dict[int, Program] = {}
        programs = {}
        trained = {id(graph) for mode, (graph, _) in graphs.items() if mode == "train"}
        for mode, (graph, replacements) in graphs.items():
            if id(graph) not in made:
                made[id(graph)] = self._program(mode, graph, replacements, id(graph) in trained)
            programs[mode] = made[id(graph)]
        self.programs: dict[Mode, Program] = programs
        self.__class__ = _with_signature(signature)

    def _program(
        self, mode: Mode, captured: CapturedGraph, replacements: tuple[Replacement, ...], training: bool
    ) -> Program:
        gm = captured.gm
        for node in gm.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                node.target = self._adopt(gm, str(node.target), mode)
        call = type(GraphModule(self, gm.graph)).forward
        lowered = self._lowered(gm.graph, training)
        _forget_tensors(gm.graph)
        return Program(
            gm.graph,
            call,
            lowered,
            captured.out_spec,
            captured.shapes,
            captured.ranges,
            replacements,
            captured.guards,
        )

    def _lowered(self, graph: Graph, training: bool) -> LoweredProgram:
        copied = Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
        copied.set_codegen(copy.deepcopy(graph._codegen))
        copied.output(copied.graph_copy(graph, {}))
        gm = GraphModule(self, copied)
        results = lower_(gm, self.lowering, training=training)
        paths = dict.fromkeys(path for r in results for f in r.replaced for path in getattr(f, "modules", ()))
        _forget_tensors(gm.graph)
        return LoweredProgram(
            gm.graph,
            type(gm).forward,
            tuple(str(r) for r in results if r.modified),
            tuple((path, _norm_module(self, path)) for path in paths),
            self.in_spec is not None,
        )

    def _adopt(self, gm: GraphModule, target: str, mode: Mode) -> str:
        """Where this module keeps an attribute of a captured graph; constants get a place of their own."""
        value = getattr_path(gm, target)
        try:
            own = getattr_path(self, target)
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

    @property
    def mode(self) -> Mode:
        return "train" if self.training else "eval"

    def train(self, mode: bool = True) -> Self:
        """Choose the train or the eval program. Raises ModeError where that one was not captured."""
        wanted: Mode = "train" if mode else "eval"
        if wanted not in self.programs:
            raise ModeError(
                f"this model has no {wanted} graph: {self.failures.get(wanted, 'it was not captured')}. "
                f"It stays in {self.mode} mode."
            )
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program = self.programs["train" if self.training else "eval"]
        leaves = self.flatten_arguments(*args, **kwargs)
        run = program.lowered.call if program.lowered.fits(self) else program.call
        outputs = run(self, *leaves)
        if program.out_spec is None:
            return outputs
        return pytree.tree_unflatten(outputs, program.out_spec)

    def flatten_arguments(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The arguments of a call as the flat inputs of the current program; raises ArgumentError."""
        program = self.programs["train" if self.training else "eval"]
        return flat_arguments(program, self.signature, self.in_spec, args, kwargs)

    def graph_module(self, mode: Mode | None = None, *, lowered: bool = False) -> GraphModule:
        """The program of a mode as a `torch.fx.GraphModule` on this model's own tensors; flat inputs.

        lowered: the form that calls run, with norms and additions folded into the reads.
        """
        mode = mode or self.mode
        if mode not in self.programs:
            raise ModeError(f"this model has no {mode} graph: {self.failures.get(mode, 'it was not captured')}.")
        program = self.programs[mode]
        return GraphModule(self, copy.deepcopy(program.lowered.graph if lowered else program.graph))

    def replacements(self, mode: Mode | None = None) -> tuple[Replacement, ...]:
        """The depth-attention nodes of a mode's graph, in execution order."""
        return self.programs[mode or self.mode].replacements

    def save(self, path: Any) -> None:
        """Write programs of both modes, weights, config and report to a file for `attnres_fx.load`."""
        from attnres_fx.conversion.files import save

        save(self, path)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves as any module does, but keeps its dtypes: the captured graphs have theirs written into them."""
        captured = self.parameters() if self.in_spec is not None else ()
        for dtype in {p.dtype for p in captured if p.is_floating_point()}:
            if (found := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise RewriteError(
                    f"a converted model cannot change from {dtype} to {found}: its graphs were captured in {dtype}. "
                    f"Cast the original model and convert it again; load_state_dict carries the weights over."
                )
        before = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        super()._apply(fn, recurse)
        after = fn(torch.empty(0, device=before)).device
        if after != before:
            self._move_programs(after)
        return self

    def _move_programs(self, device: torch.device) -> None:
        """What the graphs make on the device they were captured on is made on the new one."""
        moved: dict[int, Program] = {}
        for mode, program in self.programs.items():
            if id(program) not in moved:
                moved[id(program)] = program
                graph = on_device(program.graph, device)
                if graph is not None:
                    training = self.programs.get("train") is program
                    call = type(GraphModule(self, graph)).forward
                    lowered = self._lowered(graph, training)
                    _forget_tensors(graph)
                    moved[id(program)] = replace(program, graph=graph, call=call, lowered=lowered)
            self.programs[mode] = moved[id(program)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> Any:
        """Pickled as `save` writes it, so that `torch.save` and processes can carry it."""
        from attnres_fx.conversion.files import from_bytes, save

        file = io.BytesIO()
        save(self, file)
        return from_bytes, (file.getvalue(),)

    def extra_repr(self) -> str:
        return f"{self.signature}, modes={'/'.join(self.programs)}"


def flat_arguments(
    program: Program, signature: CallSignature, in_spec: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """The arguments of a call as the flat inputs of a program; raises ArgumentError."""
    bound_args, bound_kwargs = signature.bind(args, kwargs)
    if in_spec is None:
        return list(bound_args)
    leaves, spec = pytree.tree_flatten((bound_args, bound_kwargs))
    if len(leaves) == len(program.shapes):
        check_shapes(program.shapes, leaves, program.ranges)
    if len(leaves) != len(program.shapes) or spec != in_spec:
        raise ArgumentError(f"the arguments have another structure than the captured ones: {spec} against {in_spec}.")
    if program.guards is not None:
        _check_guards(program.guards, leaves)
    return leaves


def _norm_module(root: nn.Module, path: str) -> NormModule:
    """What a norm module computes; None where it is no plain norm, or does more when it is called."""
    module: Any = root.get_submodule(path)
    if type(module) not in (nn.LayerNorm, nn.RMSNorm) or hooked(module):
        return None
    held = tuple(name for name, value in module._parameters.items() if value is not None)
    return type(module), module.eps, tuple(module.normalized_shape), held


def _autocasts() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _check_guards(guards: Guards, leaves: list[Any]) -> None:
    if torch.compiler.is_compiling():  # guards of the tracer then, and its own words
        guards(*leaves)
        return
    try:
        guards(*leaves)
    except AssertionError as error:
        raise ArgumentError(
            f"the captured graph does not hold for arguments of these sizes: {error}. Convert again with an "
            f"example of these sizes, or capture both and choose."
        ) from error


def _with_signature(signature: CallSignature) -> type[ConvertedModel]:
    """ConvertedModel whose `forward` shows the captured arguments to whoever inspects it (export, trainers)."""

    def forward(self: ConvertedModel, *args: Any, **kwargs: Any) -> Any:
        return ConvertedModel.forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = signature.to_inspect()
    forward.__signature__ = shown.replace(parameters=[own, *shown.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = f"The original's forward, with the arguments it was captured with: {signature}."
    return type("ConvertedModel", (ConvertedModel,), {"forward": forward, "__module__": __name__})


def _forget_tensors(graph: Graph) -> None:
    """Let go of the tensors a graph was made on, so that a copy of the model does not hold the original's."""
    graph.owning_module = None
    for node in graph.nodes:
        if node.op == "get_attr" and not isinstance(node.meta.get("val"), FakeTensor):
            node.meta.pop("val", None)
