"""Saving a converted model to one file, and loading it again without the original's code.

The file is data: programs as lists of operations by name, the tensors once, config and report. Loading it runs nothing
that is in it, and imports nothing that it names.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnres_fx._version import __version__
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.conversion.captured_program import captured_graph
from attnres_fx.conversion.plain_data import from_plain, to_plain
from attnres_fx.conversion.report import ConversionReport
from attnres_fx.conversion.stored.arguments import DeviceMap
from attnres_fx.conversion.stored.container import open_container, reading, write_container
from attnres_fx.conversion.stored.program_parts import ProgramParts, program_of, written
from attnres_fx.conversion.stored.programs import ProgramReader, ProgramWriter
from attnres_fx.conversion.stored.tensors import TensorReader, TensorTable
from attnres_fx.errors import SaveError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes.lowering.lower import Lowering
from attnres_fx.passes.rewrite.topology import topology_of

FORMAT = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ModelParts:
    """What a converted model is made of, as a file holds it.

    Attributes:
        root: The modules that hold all tensors.
        attnres: The added parameters.
        programs: In the order in which a call tries them.
        failures: By mode, why there is no program.
        report: The streams, their reads and blocks, and what was left alone.
        lowering: What is folded into the reads when the model runs.
        training: Whether the model was in train mode.
    """

    root: nn.Module
    attnres: AttnResParameters
    programs: tuple[ProgramParts, ...]
    failures: Mapping[Mode, str]
    report: ConversionReport
    lowering: Lowering
    training: bool


def parts_of(model: Any) -> ModelParts:
    """What a converted model is made of.

    Raises:
        EditedError: The model was changed in a way that its programs do not see.
        SaveError: A program is older than the model.
    """
    conversion = model._attnres_conversion
    model.every_program()
    conversion.check_current(model)
    model.attnres.check_written()
    modes: dict[int, list[Mode]] = {}
    programs: dict[int, Any] = {}
    for mode, first in conversion.programs.items():
        for program in (first, *conversion.further.get(mode, ())):
            modes.setdefault(id(program), []).append(mode)
            programs.setdefault(id(program), program)
    parts = [
        ProgramParts(tuple(modes[i]), captured_graph(model, p), p.replacements, p.signature, p.in_spec, _autocast(p))
        for i, p in programs.items()
    ]
    return ModelParts(
        root=model,
        attnres=model.attnres,
        programs=tuple(parts),
        failures=conversion.failures,
        report=model.report,
        lowering=conversion.lowering,
        training=model.training,
    )


def _autocast(program: Any) -> Any:
    """The autocast of a program that was traced under one; a graph of torch functions means the same under any."""
    return program.autocast if any(dtype is not None for _, dtype in program.autocast or ()) else None


def save_parts(parts: ModelParts, target: Any) -> None:
    """Write programs, weights, config and report, whole or not at all.

    A train program with something that a file cannot hold is left out, and the report in the file says so.

    Args:
        parts: Of the model.
        target: A path, or a binary file to write to.

    Raises:
        SaveError: Something of the model cannot be written; it is named.
    """
    tensors = TensorTable()
    tensors.add_tree(parts.root)
    writer = ProgramWriter(tensors, parts.root)
    programs: list[dict[str, Any]] = []
    failures = dict(parts.failures)
    for program in parts.programs:
        kept, why = written(parts.root, program, writer)
        if why and not any("train" in p["modes"] for p in programs):
            failures["train"] = why
        if kept is not None:
            programs.append(kept)
    if not programs:
        raise SaveError(f"no program of the model can be written: {failures.get('train', 'it has none')}")
    left = {mode for program in programs for mode in program["modes"]}
    report = parts.report
    if "train" in failures and "train" not in parts.failures:
        note = f"the train program is not in the file: {failures['train']}"
        log.warning("%s: %s", report.model, note)
        report = dataclasses.replace(report, notes=(*report.notes, note), modes=tuple(sorted(left)))
    about = {
        "version": __version__,
        "training": parts.training if "train" in left else False,
        "failures": {m: w for m, w in failures.items() if m not in left},
        "report": to_plain(report, error=SaveError),
        "lowering": to_plain(parts.lowering, error=SaveError),
        "reads": [r.described() for r in parts.attnres.reads],
        "programs": programs,
        "tensors": tensors.entries,
        "checksums": tensors.checksums(),
    }
    texts = {"attnres_fx": json.dumps({"format": FORMAT, "version": __version__}), "about": json.dumps(about)}
    write_container(target, texts, tensors.data)


def load_parts(source: Any, *, map_location: Any = None) -> ModelParts:
    """Read what `save_parts` wrote.

    Args:
        source: A path, or a binary file to read from.
        map_location: A device, or a mapping or function from the devices of the file to others; by default tensors
            go where they were.

    Raises:
        SaveError: The file is damaged, holds no converted model, or has another format; the first thing that does not
            fit is named.
    """
    devices = device_map(map_location)
    with (
        reading(source, "ConvertedModel.save"),
        open_container(source, "attnres_fx", "about") as (texts, names, stored),
    ):
        head = json.loads(texts["attnres_fx"])
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise SaveError(f"it has another format than {FORMAT}, which this version reads: {head!r:.80}")
        return _parts_of(json.loads(texts["about"]), names, stored, devices)


def device_map(map_location: Any) -> DeviceMap:
    """Where what a file has on a device is to be, from `map_location` as `torch.load` takes it."""
    if map_location is None:
        return lambda device: device
    if callable(map_location):
        raise SaveError("map_location is a function of storages: give a device, or a mapping of devices.")
    try:
        if isinstance(map_location, Mapping):
            named = {str(torch.device(k)): torch.device(v) for k, v in map_location.items()}
            return lambda device: named.get(str(device), device)
        chosen = torch.device(map_location)
    except (RuntimeError, TypeError) as error:
        raise SaveError(f"map_location={map_location!r} is no device, nor a mapping of devices: {error}.") from error
    return lambda device: device if device.type == "meta" else chosen


# --- reading -----------------------------------------------------------------------------------------

_ENTRIES = "version training failures report lowering reads programs tensors checksums".split()


def _parts_of(about: Any, names: set[str], stored: Callable[[str], Tensor], device: DeviceMap) -> ModelParts:
    if not isinstance(about, dict):
        raise SaveError("it holds no description of a model")
    for name in sorted(set(_ENTRIES) ^ set(about)):
        raise SaveError(f"it {'lacks' if name in _ENTRIES else 'has the unknown entry'} {name!r:.60}")
    report = from_plain(ConversionReport, about["report"], "report", error=SaveError)
    failures = from_plain(Mapping[str, str], about["failures"], "failures", error=SaveError)
    lowering = from_plain(Lowering, about["lowering"], "lowering", error=SaveError)
    training = from_plain(bool, about["training"], "training", error=SaveError)
    tensors = TensorReader(about["tensors"], about["checksums"], names, stored, device).read()
    attnres = _attnres(about["reads"], tensors, report)
    root = _tree(about["tensors"], tensors)
    root.add_module("attnres", attnres)
    reader = ProgramReader(tensors, device)
    programs = tuple(program_of(data, root, reader, device) for data in about["programs"])
    if missing := sorted({name for _, unknown in programs for name in unknown}):
        report = _noted(report, missing)
    parts = tuple(p for p, _ in programs)
    modes = {mode for program in parts for mode in program.modes}
    _check_programs(parts, report, failures, attnres)
    if training and "train" not in modes:
        raise SaveError("the model is in train mode, and it has no train program")
    return ModelParts(root, attnres, parts, failures, report, lowering, training or modes == {"train"})


def _check_programs(
    parts: tuple[ProgramParts, ...], report: ConversionReport, failures: Mapping[str, str], attnres: AttnResParameters
) -> None:
    """Raise SaveError where the programs are not what the report says."""
    modes = {mode for program in parts for mode in program.modes}
    if not modes or modes != set(report.modes) or set(failures) & modes:
        raise SaveError(f"it has the programs {sorted(modes)}, and the report says {sorted(report.modes)}")
    for program in parts:
        for read in program.reads:
            if read.read not in attnres.reads:
                raise SaveError(f"the read {read.read!r:.60} of a program has no parameters")


def _noted(report: ConversionReport, missing: list[str]) -> ConversionReport:
    """A report that says which classes the results are not instances of, and why."""
    note = (
        f"{', '.join(missing)} is not imported in this process: results are dicts or tuples of the same entries. "
        f"Import {', '.join(sorted({m.split(':')[0] for m in missing}))} before loading to get the class."
    )
    log.info("%s", note)
    return dataclasses.replace(report, notes=(*report.notes, note))


def _attnres(reads: Any, tensors: Mapping[str, Tensor], report: ConversionReport) -> AttnResParameters:
    make, made = topology_of(report.config).described_read, []
    if not isinstance(reads, list):
        raise SaveError(f"its reads are {reads!r:.60}, which is no list")
    for described in reads:
        try:
            made.append(make(described, report.config))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise SaveError(f"it describes a read as {described!r:.80}, which is none: {error}") from error
    attnres = AttnResParameters(made, report.config, tuple(s.blocks for s in report.streams))
    held = {n.removeprefix("attnres."): t for n, t in tensors.items() if n.startswith("attnres.")}
    expected = dict(attnres.named_parameters())
    for name in (*sorted(set(expected) - set(held)), *sorted(set(held) - set(expected))):
        raise SaveError(f"the parameter attnres.{name} is {'missing' if name in expected else 'of no read'}")
    for name, tensor in held.items():
        if tensor.shape != expected[name].shape or not isinstance(tensor, nn.Parameter):
            raise SaveError(f"attnres.{name} has the shape {list(tensor.shape)}, not {list(expected[name].shape)}")
        *path, leaf = name.split(".")
        setattr(attnres.get_submodule(".".join(path)), leaf, tensor)
    return attnres


def _tree(entries: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for name, tensor in tensors.items():
        kind = entries[name]["kind"]
        *path, leaf = name.split(".")
        if kind == "loose" or path[:1] == ["attnres"]:
            continue
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        if hasattr(module, leaf):
            raise SaveError(f"the tensor {name!r:.80} has a name that a module has already")
        if kind == "parameter":
            module.register_parameter(leaf, tensor)  # type: ignore[arg-type]
        elif kind == "attribute":
            setattr(module, leaf, tensor)
        else:
            module.register_buffer(leaf, tensor, persistent=kind == "buffer")
    return root
