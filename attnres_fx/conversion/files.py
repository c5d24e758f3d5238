"""Saving a converted model to one file, and loading it again without the original's code.

The file holds one exported program a mode, the weights once, and config and report as plain data; loading
runs no pickled code. Output classes (a Hugging Face model output, say) are imported by name.
"""

import dataclasses
import importlib
import inspect
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from attnres_fx._version import __version__
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.programs import CapturedGraph
from attnres_fx.capture.signature import CallSignature, InputShape
from attnres_fx.capture.sizes import Guards, take_guards
from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.converted_model import ConvertedModel, Program
from attnres_fx.conversion.report import ConversionReport, ConvertedStream
from attnres_fx.errors import SaveError
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.parameters import AttnResParameters, DepthRead
from attnres_fx.passes.graph.nodes import plain_size
from attnres_fx.passes.lowering.lower import Lowering
from attnres_fx.passes.rewrite.depth_attention import DepthReadPlan, Replacement
from attnres_fx.passes.schedule import DepthSchedule
from attnres_fx.passes.streams.finding import Read, Stream, Term
from attnres_fx.passes.streams.refusals import Refusal

FORMAT = 1
_DATA = {
    c.__name__: c
    for c in (
        AttnResConfig,
        CallSignature,
        ConversionReport,
        ConvertedStream,
        DepthReadPlan,
        DepthSchedule,
        InputShape,
        Lowering,
        Read,
        Refusal,
        Replacement,
        Stream,
        Term,
    )
}


def save(converted: ConvertedModel, path: Any) -> None:
    """Write programs of both modes, weights, config and report. Raises SaveError where something of the
    model cannot be written."""
    programs: dict[int, str] = {}
    stored: dict[str, Any] = {}
    for mode, program in converted.programs.items():
        if id(program) not in programs:
            programs[id(program)] = mode
            stored[f"program.{mode}"] = _exported(converted, mode, program)
    try:
        about = json.dumps(_about(converted, programs))
    except (TypeError, NotImplementedError, ValueError) as error:
        raise SaveError(f"the model's arguments or outputs cannot be written as data: {error}.") from error
    torch.save({"about": about, "weights": _weights(converted), **stored}, path)


def load(path: Any, *, map_location: Any = None) -> ConvertedModel:
    """Read a model that `ConvertedModel.save` wrote. map_location: as for `torch.load`.

    Raises SaveError for a file that is no such model, or one of another format.
    """
    if not hasattr(path, "read") and not Path(path).is_file():
        raise SaveError(f"{path} is no file.")
    try:
        stored = torch.load(path, map_location=map_location, weights_only=True)
        about = json.loads(stored["about"])
    except Exception as error:
        raise SaveError(f"{path} was not written by ConvertedModel.save ({type(error).__name__}: {error}).") from error
    if about["format"] != FORMAT:
        raise SaveError(
            f"{path} has format {about['format']} (attnres_fx {about['version']}); this version reads {FORMAT}."
        )
    for module in about["imports"]:
        importlib.import_module(module)
    return _rebuilt(about, stored)


def from_bytes(data: bytes) -> ConvertedModel:
    """The model of a pickle."""
    return load(io.BytesIO(data))


# --- writing -----------------------------------------------------------------------------------------


def _about(converted: ConvertedModel, programs: dict[int, str]) -> dict[str, Any]:
    specs = [converted.in_spec, *(p.out_spec for p in converted.programs.values())]
    return {
        "format": FORMAT,
        "version": __version__,
        "training": converted.training,
        "failures": converted.failures,
        "report": _encode(converted.report),
        "signature": _encode(converted.signature),
        "lowering": _encode(converted.lowering),
        "in_spec": _dump_spec(converted.in_spec),
        "imports": sorted({t.__module__ for s in specs if s is not None for t in _types_in(s)}),
        "reads": [[r.name, r.query.shape[0], r.gate is not None] for r in converted.attnres.reads],
        "names": _names(converted),
        "programs": {
            mode: {
                "stored": programs[id(program)],
                "out_spec": _dump_spec(program.out_spec),
                "shapes": _encode(program.shapes),
                "ranges": {name: list(bounds) for name, bounds in program.ranges.items()},
                "replacements": _encode(_in_graph_order(program)),
            }
            for mode, program in converted.programs.items()
        },
    }


def _dump_spec(spec: Any) -> str | None:
    return None if spec is None else pytree.treespec_dumps(spec)


def _types_in(spec: Any) -> list[type]:
    own = [spec.type] if isinstance(spec.type, type) else []
    return own + [t for child in _children(spec) for t in _types_in(child)]


def _children(spec: Any) -> list[Any]:
    children = getattr(spec, "children", None)
    return list(children() if callable(children) else spec.children_specs)


def _names(converted: ConvertedModel) -> list[list[Any]]:
    """Every tensor of the tree: name, kind, and the name it shares its tensor with."""
    first: dict[int, str] = {}
    found = []
    for name, parameter in converted.named_parameters(remove_duplicate=False):
        found.append([name, "parameter", first.setdefault(id(parameter), name), parameter.requires_grad])
    for prefix, module in converted.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            kind = "constant" if name in module._non_persistent_buffers_set else "buffer"
            found.append([full, kind, first.setdefault(id(buffer), full), False])
    return found


def _weights(converted: ConvertedModel) -> dict[str, Tensor]:
    tensors = {n: p.detach() for n, p in converted.named_parameters(remove_duplicate=False)}
    tensors |= dict(converted.named_buffers(remove_duplicate=False))
    return {name: tensors[name] for name, _, shared, _ in _names(converted) if name == shared}


def _in_graph_order(program: Program) -> list[Replacement]:
    order = {n.name: i for i, n in enumerate(program.graph.nodes)}
    return sorted(program.replacements, key=lambda r: order[r.node])


class _FlatModel(nn.Module):
    """A program as a module: the converted model's tensors under their own names, flat inputs and outputs."""

    def __init__(self, converted: ConvertedModel, program: Program) -> None:
        super().__init__()
        for store in ("_parameters", "_buffers", "_modules"):
            getattr(self, store).update(getattr(converted, store))
        self._non_persistent_buffers_set |= converted._non_persistent_buffers_set
        self.training = converted.training

        def forward(*leaves: Any) -> Any:
            if program.guards is not None:
                program.guards(*leaves)
            return program.call(self, *leaves)

        # Named, so that what the loaded graph says of its inputs can be understood.
        names = [n.name for n, _ in _inputs(program)]
        ordered = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        forward.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
        self.forward = forward


def _exported(converted: ConvertedModel, mode: Mode, program: Program) -> Tensor:
    flags = {m: m.training for m in converted.modules()}
    try:
        nn.Module.train(converted, mode == "train")
        exported = export_flat(converted, program)
    finally:
        for module, flag in flags.items():
            module.training = flag
    for name, tensor in exported.state_dict.items():  # the weights are written once, beside the programs
        empty = torch.empty(0, dtype=tensor.dtype)
        exported.state_dict[name] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    file = io.BytesIO()
    try:
        torch.export.save(exported, file)
    except Exception as error:
        raise SaveError(f"the {mode} graph cannot be written: {type(error).__name__}: {error}") from error
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def export_flat(converted: ConvertedModel, program: Program) -> torch.export.ExportedProgram:
    """A program as `torch.export` traces it again, flat inputs and outputs, in aten operations."""
    flat = _FlatModel(converted, program)
    example, free = zip(*(_example(n, s) for n, s in _inputs(program)), strict=True)
    errors = []
    for shapes in (tuple(free), None):
        try:
            return torch.export.export(flat, tuple(example), strict=False, dynamic_shapes=shapes)
        except Exception as error:
            errors.append(error)
    raise SaveError(f"the converted graph could not be exported again: {errors[0]}") from errors[0]


def _inputs(program: Program) -> list[tuple[Any, InputShape | None]]:
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    return list(zip(nodes, program.shapes, strict=True))


def _example(node: Any, shape: InputShape | None) -> tuple[Any, Any]:
    """A stand-in for one input, and which of its sizes are free."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, Tensor):
        return value, None
    plain = [plain_size(s) for s in value.shape]
    sizes = [s if isinstance(s, int) else s.node.hint for s in plain]
    free = {i: Dim.AUTO for i, s in enumerate(plain) if not isinstance(s, int)}
    if shape is None:
        free = {i: Dim.AUTO for i, s in enumerate(sizes[:2]) if s > 1}
    return torch.zeros(sizes, dtype=value.dtype, device=value.device), free or None


# --- reading -----------------------------------------------------------------------------------------


def _rebuilt(about: dict[str, Any], stored: dict[str, Any]) -> ConvertedModel:
    report = _decode(about["report"])
    tensors = _tensors(about["names"], stored["weights"])
    root = _tree(about["names"], tensors)
    attnres = AttnResParameters([DepthRead(n, width, gated=gated) for n, width, gated in about["reads"]], report.config)
    _put(attnres, {n.removeprefix("attnres."): t for n, t in tensors.items() if n.startswith("attnres.")})
    graphs: dict[str, CapturedGraph] = {}
    result: dict[Mode, tuple[CapturedGraph, tuple[Replacement, ...]]] = {}
    for mode, program in about["programs"].items():
        name = program["stored"]
        if name not in graphs:
            gm, guards, out_spec = _loaded_graph(stored[f"program.{name}"], tensors)
            shapes = tuple(_decode(program["shapes"]))
            ranges = {n: (low, high) for n, (low, high) in program["ranges"].items()}
            # A symbolic trace returned its outputs in their structure; exported again, it returns them flat.
            graphs[name] = CapturedGraph(gm, _load_spec(program["out_spec"]) or out_spec, shapes, ranges, guards)
        result[mode] = (graphs[name], renamed(graphs[name].gm, _decode(program["replacements"])))
    converted = ConvertedModel(
        root,
        attnres,
        result,
        about["failures"],
        _decode(about["signature"]),
        _load_spec(about["in_spec"]),
        report,
        _decode(about.get("lowering")),
    )
    nn.Module.train(converted, about["training"])
    return converted


def _load_spec(text: str | None) -> Any:
    return None if text is None else pytree.treespec_loads(text)


def _tensors(names: list[list[Any]], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, kind, shared, requires_grad in names:
        if shared in made:
            made[name] = made[shared]
        else:
            value = weights[name]
            made[name] = nn.Parameter(value, requires_grad) if kind == "parameter" else value
    return made


def _tree(names: list[list[Any]], tensors: dict[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for name, kind, *_ in names:
        *path, leaf = name.split(".")
        if path[:1] == ["attnres"]:
            continue
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        if kind == "parameter":
            module.register_parameter(leaf, tensors[name])  # type: ignore[arg-type]
        else:
            module.register_buffer(leaf, tensors[name], persistent=kind == "buffer")
    return root


def _put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        setattr(module.get_submodule(".".join(path)), leaf, tensor)


def _loaded_graph(data: Tensor, tensors: dict[str, Tensor]) -> tuple[GraphModule, Guards | None, Any]:
    program = torch.export.load(io.BytesIO(data.cpu().numpy().tobytes()))
    program.state_dict.update(tensors)
    gm = program.module()
    assert isinstance(gm, GraphModule)
    guards = take_guards(gm)
    gm.graph.set_codegen(CodeGen())
    gm.recompile()
    return gm, guards, program.call_spec.out_spec


def renamed(gm: GraphModule, replacements: Sequence[Replacement]) -> tuple[Replacement, ...]:
    """The reads of a graph that was exported again, in order, with the names their nodes have there."""
    nodes = [n for n in gm.graph.nodes if n.target is DEPTH_ATTENTION]
    renamed = []
    for node, placed in zip(nodes, replacements, strict=True):
        named = [(label, s.name) for (label, _), s in zip(placed.sources, node.args[0], strict=True)]
        renamed.append(dataclasses.replace(placed, node=node.name, sources=tuple(named)))
    return tuple(renamed)


# --- data --------------------------------------------------------------------------------------------


def _encode(value: Any) -> Any:
    """Dataclasses, tuples and plain values as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"data": type(value).__name__, "fields": fields}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} {value!r}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "data" in value:
        return _DATA[value["data"]](**{n: _decode(v) for n, v in value["fields"].items()})
    if "tuple" in value:
        return tuple(_decode(v) for v in value["tuple"])
    return {_decode(k): _decode(v) for k, v in value["dict"]}
