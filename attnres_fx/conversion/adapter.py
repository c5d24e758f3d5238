"""The adapter folder: what a conversion or an attachment added to a model, without the model's own weights."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_fx._version import __version__
from attnres_fx.config import CONFIG_CLASS, RewriteConfig
from attnres_fx.conversion.adapter_folder import (
    CONFIG_FILE,
    TENSOR_FILE,
    adapter_table,
    adapter_tensors,
    replace_adapter,
)
from attnres_fx.conversion.checkpoint_styles import found_style, known_settings
from attnres_fx.conversion.foreign_checkpoints import export_foreign, load_foreign_
from attnres_fx.conversion.plain_data import from_plain
from attnres_fx.conversion.stored.container import open_container, reading, text_checksum
from attnres_fx.conversion.stored.tensors import plain_tensor
from attnres_fx.errors import SaveError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.state_config import MadeFor, StreamBlocks, shown_config

FORMAT = 1
_MADE_FOR = "attnres._extra_state"


@dataclass(frozen=True)
class ReadEntry:
    """A read as the folder names it."""

    name: str
    width: int
    gate: bool


@dataclass(frozen=True)
class BaseModel:
    """The model that the reads belong to: a fingerprint of its parameters' names and shapes, and what went into it."""

    fingerprint: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class _Folder:
    """What `attnres_config.json` holds beside the options of the config."""

    format: int
    version: str
    reads: tuple[ReadEntry, ...]
    base: BaseModel
    blocks: tuple[StreamBlocks, ...] = ()


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what a conversion added to a model, and the config it is for, to a folder.

    The folder holds `attnres_config.json` and `attnres.safetensors`. What was there before is replaced as a whole: a
    full disk or a killed process leaves the old adapter, or the new one.

    Args:
        model: A converted or attached model, or one that wraps one.
        folder: Is made where it is not there.

    Raises:
        SaveError: The model has no such parameters, or the folder cannot be written.
    """
    owner, attnres = _owner(model, None)
    described = _described(owner, attnres)
    text = json.dumps(described, sort_keys=True)
    attnres.check_written()
    tensors = {f"attnres.{n}": plain_tensor(f"attnres.{n}", p) for n, p in attnres.named_parameters()}
    tensors[_MADE_FOR] = attnres.made_for.to_tensor()  # for those who give the file to load_state_dict
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        replace_adapter(place, described, text, tensors)
    except OSError as error:
        raise SaveError(f"{place} could not be written ({error}); the adapter in it is as it was.") from error


def export_adapter(model: nn.Module, folder: str | os.PathLike[str], *, style: str) -> None:
    """Write the queries and key gains of a model as another library's checkpoints hold them.

    The folder gets a safetensors file with the tensors of the reads, and in `config.json` the settings of blocks and
    eps; what else is in it stays. `load_adapter` reads it again.

    Args:
        model: A converted or attached model, or one that wraps one, with `output="mean"` and two reads a layer.
        folder: Is made where it is not there.
        style: `"kimi"` (Kimi K3: blocks counted in decoder layers) or `"fla"` (flash-linear-attention: in sublayers).

    Raises:
        SaveError: The style cannot say what the model computes, or the folder cannot be written.
    """
    place = Path(folder)
    if (place / CONFIG_FILE).exists():
        raise SaveError(
            f"{place} holds an adapter of this library, which load_adapter would read: take another folder."
        )
    export_foreign(*_owner(model, None), place, style)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> AttnResParameters:
    """Read into a model what `save_adapter` wrote, or the reads of a checkpoint of Kimi K3 or flash-linear-attention.

    Args:
        model: A converted or attached model, or one that wraps one, of the same base model and config. It is changed
            only when everything fits. With a checkpoint of another library it takes on `output="mean"`, and the eps
            and blocks that the checkpoint's `config.json` says; of its tensors those of the reads alone are loaded.
        folder: With `attnres_config.json` and `attnres.safetensors`, or with `config.json` and safetensors files.

    Returns:
        The parameters of the model, which hold the values of the folder in the dtype and on the device that they had.

    Raises:
        SaveError: The folder is damaged, or does not fit the model; the first difference is named.
    """
    place = Path(folder)
    if not (place / CONFIG_FILE).is_file():
        with reading(place, "a library whose checkpoints are known"):
            if not place.is_dir():
                raise SaveError(f"{place} is no folder: give the one that save_adapter wrote.")
            if (found := found_style(place)) is None:
                raise SaveError(
                    f"{place} holds no adapter: it has no {CONFIG_FILE}, nor a config.json with {known_settings()}."
                )
            owner, attnres = _owner(model, None)
            load_foreign_(owner, attnres, place, *found)
        return attnres
    with reading(place, "save_adapter"):
        described = adapter_table(place)
        file = adapter_tensors(place, described.pop("checksum", None))
        config, entries = _parsed(described)
        owner, attnres = _owner(model, config)
        with open_container(file, "adapter") as (texts, names, stored):
            if json.loads(texts["adapter"]) != described:
                raise SaveError(f"{CONFIG_FILE} was changed after it was written")
            _compare(owner, attnres, config, entries)
            tensors = {name: stored(name) for name in sorted(names - {_MADE_FOR})}
            _compare_tensors(attnres, tensors)
            with torch.no_grad():
                for name, parameter in attnres.named_parameters():
                    parameter.copy_(tensors[f"attnres.{name}"])
    return attnres


def adapter_config(folder: str | os.PathLike[str]) -> RewriteConfig:
    """The config that an adapter folder was made with.

    Args:
        folder: With `attnres_config.json`.

    Returns:
        The config to convert or attach the base model with, before `load_adapter`.

    Raises:
        SaveError: The folder holds no adapter, or its config is damaged.
    """
    place = Path(folder)
    with reading(place, "save_adapter"):
        described = adapter_table(place)
        described.pop("checksum", None)
        return _parsed(described)[0]


def _owner(model: nn.Module, config: RewriteConfig | None) -> tuple[nn.Module, AttnResParameters]:
    """The module with reads of its own, which may be wrapped, and its reads."""
    found = [(m, m._modules.get("attnres")) for m in model.modules()]
    owners = [(m, a) for m, a in found if isinstance(a, AttnResParameters)]
    if len(owners) != 1:
        wanted = f"config={shown_config(config)}" if config is not None else "a config"
        has = "no" if not owners else f"{len(owners)} modules with"
        raise SaveError(
            f"this {type(model).__name__} has {has} attnres parameters: convert or attach one model, with {wanted}, "
            f"and give that."
        )
    return owners[0]


def _described(owner: nn.Module, attnres: AttnResParameters) -> dict[str, Any]:
    reads = tuple(ReadEntry(r.name, r.width, r.gate is not None) for r in attnres.reads)
    about = _Folder(FORMAT, __version__, reads, _base(owner), attnres.made_for.blocks)
    described = {**attnres.config.to_data(), **dataclasses.asdict(about)}
    return dict(json.loads(json.dumps(described)))


def _base(owner: nn.Module) -> BaseModel:
    named = owner.named_parameters(remove_duplicate=False)
    parameters = tuple((n, tuple(p.shape)) for n, p in named if n.split(".")[0] not in ("attnres", "_captured"))
    return BaseModel(_fingerprint(parameters), parameters)


def _fingerprint(parameters: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    return text_checksum(json.dumps(sorted([n, list(shape)] for n, shape in parameters)))


def _parsed(described: dict[str, Any]) -> tuple[RewriteConfig, _Folder]:
    """The config and the rest of what the folder says."""
    if described.get("format") != FORMAT:
        raise SaveError(f"it has format {described.get('format')!r:.40}; this version reads {FORMAT}")
    kind = RewriteConfig.class_in(described)
    assert dataclasses.is_dataclass(kind)
    options = {*(f.name for f in dataclasses.fields(kind)), CONFIG_CLASS}
    given = {n: v for n, v in described.items() if n in options}  # what older folders lack has its default
    config = from_plain(RewriteConfig, given, CONFIG_FILE, error=SaveError)
    rest = {n: v for n, v in described.items() if n not in options}
    return config, from_plain(_Folder, rest, CONFIG_FILE, error=SaveError)


def _compare(owner: nn.Module, attnres: AttnResParameters, config: RewriteConfig, folder: _Folder) -> None:
    """Raise SaveError for the first thing in which a model differs from the folder."""
    if different := MadeFor(config, folder.blocks).differences(attnres.made_for):
        raise SaveError(
            f"{different[0]} differs: the adapter was made with {shown_config(config)}, and this model with "
            f"{shown_config(attnres.config)}. Convert or attach the original with the adapter's config"
        )
    own = [ReadEntry(r.name, r.width, r.gate is not None) for r in attnres.reads]
    for i, (theirs, ours) in enumerate(zip(folder.reads, own, strict=False)):
        if theirs != ours:
            raise SaveError(f"read {i + 1} differs: {_words(theirs)} in the adapter, {_words(ours)} in the model")
    if len(folder.reads) != len(own):
        more, where = (folder.reads, "the adapter") if len(folder.reads) > len(own) else (own, "the model")
        read = more[min(len(folder.reads), len(own))]
        raise SaveError(f"{where} alone has the read {_words(read)}: {len(folder.reads)} reads against {len(own)}")
    base = _base(owner)
    if folder.base.fingerprint != _fingerprint(folder.base.parameters):
        raise SaveError("the fingerprint of the base model does not fit the parameters that are listed")
    if folder.base.fingerprint != base.fingerprint:
        raise SaveError(f"the base model is another: {_first_difference(folder.base, base)}")


def _words(read: ReadEntry) -> str:
    return f"{read.name!r} of width {read.width}" + (" with a gate" if read.gate else "")


def _first_difference(theirs: BaseModel, ours: BaseModel) -> str:
    there, here = dict(theirs.parameters), dict(ours.parameters)
    for name, shape in there.items():
        if name not in here:
            return f"the adapter's had a parameter {name!r} {list(shape)}, which this one lacks"
        if shape != here[name]:
            return f"{name!r} was {list(shape)} and is {list(here[name])}"
    name = next(n for n in here if n not in there)
    return f"this one has a parameter {name!r} {list(here[name])}, which the adapter's lacked"


def _compare_tensors(attnres: AttnResParameters, tensors: Mapping[str, Tensor]) -> None:
    own = {f"attnres.{n}": p for n, p in attnres.named_parameters()}
    for name in (*sorted(set(own) - set(tensors)), *sorted(set(tensors) - set(own))):
        raise SaveError(f"{TENSOR_FILE} {'lacks' if name in own else 'has the unknown tensor'} {name!r}")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape or not tensors[name].is_floating_point():
            raise SaveError(
                f"{name!r} is {list(tensors[name].shape)} in the adapter and {list(parameter.shape)} in the model"
            )
