"""Model to traced graphs: `torch.export` for a module, or a graph that somebody else traced."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from attnres_fx.call import CallSignature, InputShape, signature_of
from attnres_fx.errors import AttnResError, CaptureError
from attnres_fx.passes.pipeline import propagate_values_
from attnres_fx.passes.spelling import trains

log = logging.getLogger(__name__)

Mode = Literal["train", "eval"]


@dataclass
class CapturedGraph:
    """One mode of a model as a graph with flat inputs and outputs.

    gm: ours to change; its tensors are the model's own. out_spec: pytree of the outputs, None where the
    graph returns them in their structure. shapes: one entry an input. ranges: sizes of each symbol.
    """

    gm: GraphModule
    out_spec: Any
    shapes: tuple[InputShape | None, ...]
    ranges: dict[str, tuple[int, int | None]]


@dataclass
class Captured:
    """All graphs of a model.

    graphs: by mode. failures: by mode, why there is none. root: the modules that hold the model's
    parameters and buffers, ours. in_spec: pytree of (args, kwargs), None where the graph takes them as
    they are. notes: what a user should know.
    """

    graphs: dict[Mode, CapturedGraph]
    failures: dict[Mode, str]
    root: nn.Module
    signature: CallSignature
    in_spec: Any
    training: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def capture(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    dynamic_shapes: Any = None,
    modes: Sequence[Mode] = ("train", "eval"),
) -> Captured:
    """Trace a model in the modes asked for, its own first; a graph module is taken as it is.

    Raises CaptureError where the model's own mode, and every other, cannot be traced.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        return _from_exported(model, args, kwargs)
    if isinstance(model, GraphModule):
        return _from_graph_module(model, args, kwargs)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: pass an nn.Module, a torch.fx.GraphModule or an ExportedProgram."
        )
    return _from_module(model, args, kwargs, dynamic_shapes, modes)


# --- an nn.Module ------------------------------------------------------------------------------------


def _from_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    modes: Sequence[Mode],
) -> Captured:
    own: Mode = "train" if model.training else "eval"
    notes: list[str] = []
    bound = _bind_cache_off(model, args, kwargs)
    if bound:
        notes.append("use_cache=False is bound: a cache object cannot be captured")
    kwargs = {**kwargs, **bound}
    example = _without_ones(model, args, kwargs) if dynamic_shapes is None else (args, kwargs)
    graphs: dict[Mode, CapturedGraph] = {}
    failures: dict[Mode, str] = {}
    in_spec = None
    for mode in sorted({*modes, own}, key=lambda m: m != own):
        if mode not in modes:
            continue
        try:
            program = _export(model, mode, example[0], example[1], dynamic_shapes, notes)
        except CaptureError as error:
            failures[mode] = str(error)
            continue
        graphs[mode] = _graph_of(program)
        in_spec = program.call_spec.in_spec
    if not graphs:
        raise CaptureError(failures[own])
    signature = signature_of(model.forward, args, kwargs, tuple(bound))
    return Captured(
        graphs, failures, mirror(model), signature, in_spec, own == "train", args, kwargs, sorted(set(notes))
    )


def _export(
    model: nn.Module, mode: Mode, args: Any, kwargs: Any, dynamic_shapes: Any, notes: list[str]
) -> ExportedProgram:
    """Export in one mode, giving up freedom of sizes only as far as it must."""
    attempts = _attempts(model, args, kwargs, dynamic_shapes)
    errors: list[Exception] = []
    for shapes, what_is_lost in attempts:
        with (
            in_mode(model, mode),
            _fast_path_off(),
            _checkpoint_watch() as checkpointed,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            try:
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            except AttnResError:
                raise
            except Exception as error:  # the tracer lets anything the model raises through
                errors.append(error)
                continue
        if what_is_lost:
            notes.append(what_is_lost)
        if checkpointed and mode == "train":
            warnings.warn(
                "the model checkpoints activations, which torch.export does not keep: the converted model saves "
                "them all. The compile backend keeps checkpointing.",
                stacklevel=4,
            )
        return program
    raise CaptureError(_capture_message(model, mode, errors[-1])) from errors[-1]


def _capture_message(model: nn.Module, mode: Mode, error: Exception) -> str:
    cause = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{type(model).__name__} could not be captured in {mode} mode: {type(error).__name__}: {cause[:600]}. "
        f"Try torch.export.export(model, args, kwargs, strict=False) alone to see the whole trace; then remove "
        f"the data-dependent code it names, pass other example arguments, capture a part of the model, or trace "
        f"it yourself (torch.fx.symbolic_trace, torch.export) and convert the graph."
    )


def _attempts(model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> list[tuple[Any, str]]:
    if dynamic_shapes is not None:
        return [(dynamic_shapes, "")]
    free = [_free_sizes(model, args, kwargs, limit) for limit in (2, 1)]
    attempts = [(free[0], ""), (free[1], "only the first dimension of each argument is free"), (None, "")]
    attempts[-1] = (None, "the sizes of all arguments are fixed")
    kept: list[tuple[Any, str]] = []
    for attempt in attempts:
        if attempt[0] not in [k[0] for k in kept]:
            kept.append(attempt)
    return kept


def _free_sizes(model: nn.Module, args: Any, kwargs: Any, limit: int) -> Any:
    """`Dim.AUTO` for leading dimensions, and for later ones of a size that a sequence has (masks)."""
    lengths = {
        leaf.shape[1]
        for leaf in pytree.tree_leaves((args, kwargs))
        if isinstance(leaf, Tensor) and 1 < leaf.dim() <= 3 and leaf.shape[1] > 1
    }

    def sizes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        free = {
            i: Dim.AUTO
            for i, size in enumerate(leaf.shape)
            if size > 1 and (i < limit or (limit > 1 and leaf.dim() > 3 and size in lengths))
        }
        return free or None

    names = _forward_names(model, len(args))
    by_name = {n: pytree.tree_map(sizes, v) for n, v in zip(names, args, strict=True)}
    by_name |= {n: pytree.tree_map(sizes, v) for n, v in kwargs.items()}
    if not any(isinstance(leaf, type(Dim.AUTO)) for leaf in pytree.tree_leaves(by_name)):
        return None
    if len(by_name) > len(names) + len(kwargs) or any(n.startswith("*") for n in names):
        return None
    return by_name


def _forward_names(model: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY)]
    return names[:count] if len(names) >= count else names + ["*"] * (count - len(names))


def _bind_cache_off(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """`use_cache=False` where the model returns an object pytree does not know and takes that argument."""
    if "use_cache" in kwargs or "use_cache" not in inspect.signature(model.forward).parameters:
        return {}
    names = list(inspect.signature(model.forward).parameters)
    if names.index("use_cache") < len(args):
        return {}
    try:
        output = run_untouched(model, args, kwargs, "eval")
    except Exception:
        return {}  # whatever is wrong, the capture says it better
    plain = (Tensor, int, float, bool, str, type(None))
    known = all(isinstance(leaf, plain) for leaf in pytree.tree_leaves(output))
    return {} if known else {"use_cache": False}


def _without_ones(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The example with its sizes of 1 doubled, where the outputs of the first half stay what they were.

    A size of 1 in the example would be frozen by the capture.
    """
    for limit in (2, 1):
        doubled = pytree.tree_map(lambda leaf, limit=limit: _doubled(leaf, limit), (args, kwargs))
        pairs = zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(doubled), strict=True)
        if all(a is b for a, b in pairs):
            return args, kwargs
        try:
            before = pytree.tree_leaves(run_untouched(model, args, kwargs, "eval"))
            after = pytree.tree_leaves(run_untouched(model, doubled[0], doubled[1], "eval"))
        except Exception:
            continue
        if len(before) == len(after) and all(map(_is_first_half, before, after)):
            return doubled  # type: ignore[no-any-return]
    return args, kwargs


def _doubled(leaf: Any, limit: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dim() < 2:
        return leaf
    for i in range(min(limit, leaf.dim())):
        if leaf.shape[i] == 1:
            leaf = torch.cat([leaf, leaf], i)
    return leaf


def _is_first_half(before: Any, after: Any) -> bool:
    if not isinstance(before, Tensor):
        return bool(before == after)
    if not isinstance(after, Tensor) or before.dim() != after.dim() or before.is_meta:
        return False
    for i, size in enumerate(before.shape):
        after = after.narrow(i, 0, min(size, after.shape[i]))
    if before.shape != after.shape:
        return False
    tolerance = 1e-4 if before.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(before.double(), after.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def _graph_of(program: ExportedProgram) -> CapturedGraph:
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    gm.graph.set_codegen(CodeGen())
    gm.recompile()
    ranges = {str(symbol): _range(bounds) for symbol, bounds in program.range_constraints.items()}
    return CapturedGraph(gm, program.call_spec.out_spec, _input_shapes(gm), ranges)


def _range(bounds: Any) -> tuple[int, int | None]:
    """Sizes a symbol may have. A lower bound of 2 only says that the tracer set 0 and 1 apart."""
    low = int(bounds.lower)
    high = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**31 else None
    return (0 if low == 2 else low), high


def _input_shapes(gm: GraphModule) -> tuple[InputShape | None, ...]:
    shapes: list[InputShape | None] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            shapes.append(None)
            continue
        sizes = tuple(s if isinstance(s, int) else str(s) for s in value.shape)
        shapes.append(InputShape(str(node.target), sizes))
    return tuple(shapes)


# --- a graph somebody else traced --------------------------------------------------------------------


def _from_exported(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    if not args and not kwargs and program.example_inputs is not None:
        args, kwargs = program.example_inputs
    graph = _graph_of(program)
    mode = _mode_of(graph.gm) or "eval"
    names, keywords = _names_in(program.call_spec.in_spec, graph.gm)
    signature = CallSignature(names, names, keywords, {})
    root = shared_copy(graph.gm)
    return Captured(
        graphs={mode: graph},
        failures={_other(mode): "an exported program holds one mode; convert the nn.Module to get both"},
        root=root,
        signature=signature,
        in_spec=program.call_spec.in_spec,
        training=mode == "train",
        args=tuple(args),
        kwargs=dict(kwargs),
    )


def _names_in(in_spec: Any, gm: GraphModule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of positional and keyword arguments of a captured tree, positional ones by their placeholder."""
    placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    positional, keyword = in_spec.children() if callable(getattr(in_spec, "children", None)) else in_spec.children_specs
    names, at = [], 0
    specs = positional.children() if callable(getattr(positional, "children", None)) else positional.children_specs
    for i, spec in enumerate(specs):
        single = spec.num_leaves == 1 and at < len(placeholders)
        names.append(placeholders[at] if single else f"args_{i}")
        at += spec.num_leaves
    return tuple(names), tuple(keyword.context or ())


def _from_graph_module(model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    if hasattr(model, "_in_spec") and hasattr(model, "_out_spec"):
        return _from_exported_module(model, args, kwargs)
    gm = shared_copy(model)
    names = tuple(str(n.target).lstrip("*") for n in gm.graph.nodes if n.op == "placeholder")
    defaults = {str(n.target): n.args[0] for n in gm.graph.nodes if n.op == "placeholder" and n.args}
    signature = CallSignature(names, names, (), {n: v for n, v in defaults.items() if not isinstance(v, Tensor)})
    if args or kwargs:
        args, kwargs = signature.bind(args, kwargs)
    propagate_values_(gm, args)
    mode = _mode_of(gm)
    modes: tuple[Mode, ...] = (mode,) if mode else ("train", "eval")
    graph = CapturedGraph(gm, None, tuple(None for _ in names), {})
    failures: dict[Mode, str] = (
        {_other(mode): f"the graph was traced in {mode} mode; trace it in the other one, or convert the nn.Module"}
        if mode
        else {}
    )
    training = mode == "train" if mode else model.training
    return Captured(dict.fromkeys(modes, graph), failures, gm, signature, None, training, args, kwargs)


def _from_exported_module(model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    gm = shared_copy(model)
    in_spec, out_spec = model._in_spec, model._out_spec
    gm.graph.set_codegen(CodeGen())
    gm.recompile()
    mode = _mode_of(gm) or "eval"
    names, keywords = _names_in(in_spec, gm)
    return Captured(
        graphs={mode: CapturedGraph(gm, out_spec, _input_shapes(gm), {})},
        failures={_other(mode): "an exported graph holds one mode; convert the nn.Module to get both"},
        root=gm,
        signature=CallSignature(names, names, keywords, {}),
        in_spec=in_spec,
        training=mode == "train",
        args=args,
        kwargs=kwargs,
    )


def _mode_of(gm: GraphModule) -> Mode | None:
    """The mode a graph was traced in, as far as its nodes tell."""
    baked = {trains(n) for n in gm.graph.nodes} - {None}
    return None if not baked else "train" if True in baked else "eval"


def _other(mode: Mode) -> Mode:
    return "eval" if mode == "train" else "train"


# --- modules and modes -------------------------------------------------------------------------------


def shared_copy(module: Any) -> Any:
    """A copy of a module tree that holds the same parameter and buffer objects."""
    import copy

    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def mirror(model: nn.Module) -> nn.Module:
    """Empty modules in the shape of a model's tree, holding the model's own parameters and buffers."""
    made: dict[int, nn.Module] = {}

    def build(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        empty = made[id(module)] = nn.Module()
        for name, parameter in module._parameters.items():
            empty.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            empty.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            empty.add_module(name, build(child) if child is not None else None)
        return empty

    return build(model)


@contextlib.contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The model in train or eval mode; every module's own flag is put back after."""
    flags = {m: m.training for m in model.modules()}
    try:
        if model.training != (mode == "train"):
            model.train(mode == "train")
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def run_untouched(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], mode: Mode, *, seed: int = 0
) -> Any:
    """Outputs of one run that leaves buffers, arguments and random state as they were, without gradients."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (tuple(args), dict(kwargs)))
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index for d in devices]), torch.no_grad(), in_mode(model, mode):
        torch.manual_seed(seed)
        with _fast_path_off():
            return torch.func.functional_call(model, buffers, args, dict(kwargs))


@contextlib.contextmanager
def _fast_path_off() -> Iterator[None]:
    """nn.TransformerEncoder without its fused inference path, which has no additions to find."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _checkpoint_watch() -> Iterator[list[bool]]:
    """Notes whether the model calls `torch.utils.checkpoint`."""
    import torch.utils.checkpoint as module

    seen: list[bool] = []
    names = ("_checkpoint_without_reentrant_generator", "_infer_device_type")
    originals: dict[str, Callable[..., Any]] = {n: getattr(module, n) for n in names if hasattr(module, n)}

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(True)
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(module, name, watched(original))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
