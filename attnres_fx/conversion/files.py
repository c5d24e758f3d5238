"""Saving a converted model to one file, and loading it again without the original's code.

The file holds one exported program a mode, the weights once, and config and report as plain data; loading
runs no pickled code. Output classes (a Hugging Face model output, say) are imported by name.
"""

import importlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from attnres_fx._version import __version__
from attnres_fx.capture.captured import CapturedGraph, flat_module
from attnres_fx.capture.isolated_run import Mode, in_mode
from attnres_fx.capture.side_effects import TensorWrite
from attnres_fx.capture.signature import CallSignature, InputShape, child_specs
from attnres_fx.capture.size_guards import SizeGuards
from attnres_fx.capture.sizes import Guards
from attnres_fx.conversion.flat_export import export_flat, in_graph_order, reads_of_export
from attnres_fx.conversion.plain_data import from_plain, to_plain
from attnres_fx.conversion.report import ConversionReport
from attnres_fx.errors import SaveError
from attnres_fx.parameters import AttnResParameters, DepthRead
from attnres_fx.passes.lowering.lower import Lowering
from attnres_fx.passes.rewrite.depth_attention import Replacement

FORMAT = 2


@dataclass(frozen=True, eq=False)
class ModelParts:
    """What a converted model is made of, as a file holds it.

    Attributes:
        root: the modules that hold all tensors; when read, without the added parameters.
        attnres: the added parameters.
        graphs: by mode, with the reads of each; modes may share one.
        failures: by mode, why there is no graph.
        signature: the arguments of a call.
        in_spec: pytree of (args, kwargs), None where the graphs take them as they are.
        report: the streams, their reads and blocks, and what was left alone.
        lowering: what is folded into the reads when the model runs.
        training: whether the model was in train mode.
    """

    root: nn.Module
    attnres: AttnResParameters
    graphs: Mapping[Mode, tuple[CapturedGraph, tuple[Replacement, ...]]]
    failures: Mapping[Mode, str]
    signature: CallSignature
    in_spec: Any
    report: ConversionReport
    lowering: Lowering
    training: bool


def save_parts(parts: ModelParts, path: Any) -> None:
    """Write programs of both modes, weights, config and report.

    Raises:
        SaveError: something of the model cannot be written.
    """
    programs: dict[int, str] = {}
    stored: dict[str, Any] = {}
    for mode, (graph, _) in parts.graphs.items():
        if id(graph) not in programs:
            programs[id(graph)] = mode
            stored[f"program.{mode}"] = _exported(parts.root, mode, graph)
    try:
        about = json.dumps(_about(parts, programs))
    except (TypeError, NotImplementedError, ValueError, SaveError) as error:
        raise SaveError(f"the model's arguments or outputs cannot be written as data: {error}") from error
    torch.save({"about": about, "weights": _weights(parts.root), **stored}, path)


def load_parts(path: Any, *, map_location: Any = None) -> ModelParts:
    """Read what `save_parts` wrote.

    Args:
        path: a path, or a binary file to read from.
        map_location: as for `torch.load`.

    Raises:
        SaveError: the file is no such model, or one of another format.
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
    return _parts_of(about, stored)


# --- writing -----------------------------------------------------------------------------------------


def _about(parts: ModelParts, programs: dict[int, str]) -> dict[str, Any]:
    specs = [parts.in_spec, *(g.out_spec for g, _ in parts.graphs.values())]
    return {
        "format": FORMAT,
        "version": __version__,
        "training": parts.training,
        "failures": dict(parts.failures),
        "report": to_plain(parts.report, error=SaveError),
        "signature": to_plain(parts.signature, error=SaveError),
        "lowering": to_plain(parts.lowering, error=SaveError),
        "in_spec": _dump_spec(parts.in_spec),
        "imports": sorted({t.__module__ for s in specs if s is not None for t in _types_in(s)}),
        "reads": [[r.name, r.query.shape[0], r.gate is not None] for r in parts.attnres.reads],
        "names": _names(parts.root),
        "programs": {
            mode: {
                "stored": programs[id(graph)],
                "out_spec": _dump_spec(graph.out_spec),
                "shapes": to_plain(graph.shapes, error=SaveError),
                "ranges": {name: list(bounds) for name, bounds in graph.ranges.items()},
                "writes": to_plain(graph.writes, error=SaveError),
                "size_guards": _plain_guards(graph.guards),
                "replacements": to_plain(in_graph_order(graph.gm, replacements), error=SaveError),
            }
            for mode, (graph, replacements) in parts.graphs.items()
        },
    }


def _plain_guards(guards: Guards | None) -> dict[str, Any] | None:
    """Conditions on sizes as data; None where they are part of an exported program."""
    if not isinstance(guards, SizeGuards):
        return None
    return {"places": dict(guards.places), "conditions": list(guards.conditions), "names": list(guards.names)}


def _guards_of(data: dict[str, Any] | None, exported: Guards | None) -> Guards | None:
    if data is None:
        return exported
    places = {name: (i, d) for name, (i, d) in data["places"].items()}
    return SizeGuards(places, tuple(data["conditions"]), tuple(data["names"]))


def _dump_spec(spec: Any) -> str | None:
    return None if spec is None else pytree.treespec_dumps(spec)


def _types_in(spec: Any) -> list[type]:
    own = [spec.type] if isinstance(spec.type, type) else []
    return own + [t for child in child_specs(spec) for t in _types_in(child)]


def _names(root: nn.Module) -> list[list[Any]]:
    """Every tensor of the tree: name, kind, and the name it shares its tensor with."""
    first: dict[int, str] = {}
    entries: list[list[Any]] = []
    for name, parameter in root.named_parameters(remove_duplicate=False):
        entries.append([name, "parameter", first.setdefault(id(parameter), name), parameter.requires_grad])
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            kind = "constant" if name in module._non_persistent_buffers_set else "buffer"
            entries.append([full, kind, first.setdefault(id(buffer), full), False])
    return entries


def _weights(root: nn.Module) -> dict[str, Tensor]:
    tensors = {n: p.detach() for n, p in root.named_parameters(remove_duplicate=False)}
    tensors |= dict(root.named_buffers(remove_duplicate=False))
    return {name: tensors[name] for name, _, shared, _ in _names(root) if name == shared}


def _exported(root: nn.Module, mode: Mode, captured: CapturedGraph) -> Tensor:
    with in_mode(root, mode):
        exported = export_flat(root, captured)
    for name, tensor in exported.state_dict.items():  # the weights are written once, beside the programs
        empty = torch.empty(0, dtype=tensor.dtype)
        exported.state_dict[name] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    file = io.BytesIO()
    try:
        torch.export.save(exported, file)
    except Exception as error:
        raise SaveError(f"the {mode} graph cannot be written: {type(error).__name__}: {error}") from error
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


# --- reading -----------------------------------------------------------------------------------------


def _parts_of(about: dict[str, Any], stored: dict[str, Any]) -> ModelParts:
    report = from_plain(ConversionReport, about["report"], "report", error=SaveError)
    tensors = _tensors(about["names"], stored["weights"])
    attnres = AttnResParameters([DepthRead(n, width, gated=gated) for n, width, gated in about["reads"]], report.config)
    _put(attnres, {n.removeprefix("attnres."): t for n, t in tensors.items() if n.startswith("attnres.")})
    graphs: dict[str, CapturedGraph] = {}
    by_mode: dict[Mode, tuple[CapturedGraph, tuple[Replacement, ...]]] = {}
    for mode, program in about["programs"].items():
        name = program["stored"]
        if name not in graphs:
            gm, guards, out_spec = _loaded_graph(stored[f"program.{name}"], tensors)
            shapes = from_plain(tuple[InputShape | None, ...], program["shapes"], f"{mode}.shapes", error=SaveError)
            ranges = {n: (low, high) for n, (low, high) in program["ranges"].items()}
            writes = from_plain(tuple[TensorWrite, ...], program["writes"], f"{mode}.writes", error=SaveError)
            guards = _guards_of(program["size_guards"], guards)
            # A symbolic trace returned its outputs in their structure; exported again, it returns them flat.
            spec = _load_spec(program["out_spec"]) or out_spec
            graphs[name] = CapturedGraph(gm, spec, shapes, ranges, guards, writes, typed=True)
        reads = from_plain(tuple[Replacement, ...], program["replacements"], f"{mode}.replacements", error=SaveError)
        by_mode[mode] = (graphs[name], reads_of_export(graphs[name].gm, reads))
    return ModelParts(
        root=_tree(about["names"], tensors),
        attnres=attnres,
        graphs=by_mode,
        failures=about["failures"],
        signature=from_plain(CallSignature, about["signature"], "signature", error=SaveError),
        in_spec=_load_spec(about["in_spec"]),
        report=report,
        lowering=from_plain(Lowering, about["lowering"], "lowering", error=SaveError),
        training=about["training"],
    )


def _load_spec(text: str | None) -> Any:
    return None if text is None else pytree.treespec_loads(text)


def _tensors(names: list[list[Any]], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, kind, shared, requires_grad in names:
        if shared in tensors:
            tensors[name] = tensors[shared]
        else:
            value = weights[name]
            tensors[name] = nn.Parameter(value, requires_grad) if kind == "parameter" else value
    return tensors


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
    return *flat_module(program), program.call_spec.out_spec
