"""A program with the way it is called, as JSON, and back."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from attnres_fx.capture.assumed import Assumed
from attnres_fx.capture.captured import CapturedGraph, graph_of_export
from attnres_fx.capture.exported_module import lost_by_export
from attnres_fx.capture.isolated_run import Mode, in_mode
from attnres_fx.capture.side_effects import TensorWrite
from attnres_fx.capture.signature import CallSignature, InputShape
from attnres_fx.conversion.flat_export import export_flat, in_graph_order, reads_of_export
from attnres_fx.conversion.plain_data import from_plain, to_plain
from attnres_fx.conversion.stored.arguments import ArgumentReader, DeviceMap, to_data
from attnres_fx.conversion.stored.guards import guards_from_data, guards_to_data
from attnres_fx.conversion.stored.programs import ProgramReader, ProgramWriter
from attnres_fx.conversion.stored.structures import StructureReader, structure_to_data
from attnres_fx.errors import AttnResError, SaveError
from attnres_fx.passes.rewrite.execution import Replacement
from attnres_fx.passes.rewrite.topology import read_operators


@dataclass(frozen=True, eq=False)
class ProgramParts:
    """A program as a file holds it.

    Attributes:
        modes: That run it; one that has another program before runs this for other kinds of calls.
        graph: With its reads put in.
        reads: That were put in.
        signature: The arguments of a call.
        in_spec: Pytree of (args, kwargs), None where the graph takes them as they are.
        autocast: That the graph was traced under, None where it means the same under any.
    """

    modes: tuple[Mode, ...]
    graph: CapturedGraph
    reads: tuple[Replacement, ...]
    signature: CallSignature
    in_spec: Any
    autocast: Any = None


@dataclass(frozen=True)
class _About:
    """What a file says of a program in plain data."""

    modes: tuple[Mode, ...]
    shapes: tuple[InputShape | None, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    writes: tuple[TensorWrite, ...]
    reads: tuple[Replacement, ...]
    lost: tuple[str, ...]
    typed: bool
    assumed: Assumed = dataclasses.field(default_factory=Assumed)


_STRUCTURED = {"signature", "in_spec", "out_spec", "guards", "autocast", "graph"}
_KINDS = {"", "floating", "integer", "boolean", "complex"}


def written(root: nn.Module, program: ProgramParts, writer: ProgramWriter) -> tuple[dict[str, Any] | None, str]:
    """A program as JSON; or None, and why its train form cannot be written.

    Raises:
        SaveError: Its eval form cannot be written.
    """
    modes, why = list(program.modes), ""
    graph, reads = program.graph, tuple(in_graph_order(program.graph.gm, program.reads))
    if graph.out_spec is None:  # a symbolic trace, which calls modules
        mode: Mode = "train" if "train" in modes else "eval"
        with in_mode(root, mode), lost_by_export() as lost:
            exported = graph_of_export(export_flat(root, graph))
        if lost and mode == "train":
            why = f"torch.export, which turns the modules that it calls into operations, loses {' and '.join(lost)}"
            modes = [m for m in modes if m != "train"]
            if not modes:
                return None, why
        reads = reads_of_export(exported.gm, reads)
        graph = dataclasses.replace(exported, shapes=graph.shapes, ranges=graph.ranges, guards=None)
    try:
        return {"modes": modes, **_program(graph, reads, program, writer)}, why
    except SaveError as error:
        if modes != ["train"]:
            raise SaveError(f"the {'/'.join(modes)} program cannot be written: {error}.") from error
        return None, str(error)


def _program(
    graph: CapturedGraph, reads: tuple[Replacement, ...], program: ProgramParts, writer: ProgramWriter
) -> dict[str, Any]:
    signature = program.signature
    names = [str(n.target) for n in graph.gm.graph.nodes if n.op == "placeholder"]
    fields = {f.name: getattr(signature, f.name) for f in dataclasses.fields(signature)}
    return {
        "signature": {n: to_data(dict(v) if isinstance(v, Mapping) else list(v)) for n, v in fields.items()},
        "in_spec": structure_to_data(program.in_spec),
        "out_spec": structure_to_data(graph.out_spec),
        "shapes": to_plain(graph.shapes, error=SaveError),
        "ranges": {name: list(bounds) for name, bounds in graph.ranges.items()},
        "guards": guards_to_data(graph.guards, names),
        "writes": to_plain(graph.writes, error=SaveError),
        "typed": graph.typed,
        "assumed": to_plain(graph.assumed.in_file(), error=SaveError),
        "lost": list(graph.lost),
        "autocast": to_data(program.autocast),
        "reads": to_plain(list(reads), error=SaveError),
        "graph": writer.write(graph.gm),
    }


def program_of(data: Any, root: nn.Module, reader: ProgramReader, device: DeviceMap) -> tuple[ProgramParts, list[str]]:
    """A program, and the classes of its structures that this process does not know.

    Args:
        data: What `written` returned.
        root: The modules that hold its tensors.
        reader: Of graphs.
        device: Where what the file has on a device is now.

    Raises:
        SaveError: The data has another form; the first thing that does not fit is named.
    """
    plain = ArgumentReader({}, device)
    structures = StructureReader(plain)
    if not isinstance(data, dict) or not set(data) >= _STRUCTURED:
        raise SaveError("a program is incomplete")
    about = from_plain(_About, {n: v for n, v in data.items() if n not in _STRUCTURED}, "a program", error=SaveError)
    at = "/".join(about.modes)
    try:
        gm = reader.read(data["graph"], root)
    except AttnResError as error:
        raise SaveError(f"the {at} program: {error}") from error
    out_spec, in_spec = structures.read(data["out_spec"]), structures.read(data["in_spec"])
    autocast = plain.read(data["autocast"])
    if not all(_is_autocast(entry) for entry in (() if autocast is None else autocast)):
        raise SaveError(f"the {at} program's autocast is {autocast!r:.60}")
    _check(at, gm, about, out_spec, root)
    guards = guards_from_data(data["guards"], len(about.shapes))
    ranges = dict(about.ranges)
    graph = CapturedGraph(gm, out_spec, about.shapes, ranges, guards, about.writes, lost=about.lost, typed=about.typed)
    graph.assumed = about.assumed
    signature = _signature(plain, data["signature"])
    return ProgramParts(about.modes, graph, about.reads, signature, in_spec, autocast), structures.missing


def _check(at: str, gm: GraphModule, about: _About, out_spec: Any, root: nn.Module) -> None:
    """Raise SaveError where a graph does not have what is said of it."""
    if not about.modes:
        raise SaveError("a program belongs to no mode")
    known = {n.name: n for n in gm.graph.nodes}
    inputs = [n for n in known.values() if n.op == "placeholder"]
    outputs = known["output"].args[0] if "output" in known else None
    if len(about.shapes) != len(inputs) or out_spec is None or not isinstance(outputs, list | tuple):
        raise SaveError(f"the {at} program has not the inputs and outputs that it is said to have")
    if not about.assumed.fits(len(inputs)):
        raise SaveError(f"the {at} program takes something for granted of inputs that it does not have")
    if unknown := {s.kind for s in about.shapes if s is not None} - _KINDS:
        raise SaveError(f"an input of the {at} program is of the kind {min(unknown)!r:.40}")
    for read in about.reads:
        if read.node not in known or known[read.node].target not in read_operators():
            raise SaveError(f"the {at} program has no node {read.node!r:.60} for the read {read.read!r:.60}")
    _check_outputs(at, outputs, out_spec, about.writes, root)


def _check_outputs(at: str, outputs: Any, out_spec: Any, writes: tuple[TensorWrite, ...], root: nn.Module) -> None:
    if out_spec.num_leaves + len(writes) != len(outputs):
        raise SaveError(f"the {at} program returns {len(outputs)} values, not {out_spec.num_leaves + len(writes)}")
    for write in writes:
        module = root.get_submodule(write.module)
        store = module._buffers if write.buffer else module.__dict__
        taken = not write.buffer and hasattr(nn.Module, write.name)
        if taken or not write.name.isidentifier() or (write.buffer and write.name not in store):
            raise SaveError(f"the {at} program writes to {write.place!r:.60}, which is no tensor of the model")
        if not 0 <= write.output < len(outputs):
            raise SaveError(f"the {at} program has no output {write.output} for {write.place!r:.60}")


def _is_autocast(entry: Any) -> bool:
    """Whether it is a type of device and the dtype that autocast casts to there, None where it is off."""
    pair = isinstance(entry, tuple) and len(entry) == 2
    return pair and isinstance(entry[0], str) and isinstance(entry[1], torch.dtype | None)


def _signature(plain: ArgumentReader, data: Any) -> CallSignature:
    fields = {f.name for f in dataclasses.fields(CallSignature)}
    if not isinstance(data, dict) or set(data) != fields:
        raise SaveError("the arguments of a call are incomplete")
    read = {name: plain.read(value) for name, value in data.items()}
    constants = read.pop("constants")
    if not isinstance(constants, dict) or not all(
        isinstance(v, list) and all(isinstance(n, str) for n in v) for v in read.values()
    ):
        raise SaveError("the arguments of a call are no names")
    return CallSignature(**{n: tuple(v) for n, v in read.items()}, constants=constants)
