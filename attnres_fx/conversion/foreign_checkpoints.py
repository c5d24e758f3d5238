"""Reading a checkpoint of another library into a model, and writing one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.checkpoint_styles import (
    SETTINGS_FILE,
    CheckpointStyle,
    read_pairs,
    style_named,
    written_pairs,
)
from attnres_fx.conversion.reconfiguring import reconfigure_
from attnres_fx.conversion.stored.container import write_container
from attnres_fx.conversion.stored.tensors import plain_tensor
from attnres_fx.conversion.stored.whole_file import write_whole
from attnres_fx.errors import SaveError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes.schedule import plan_schedule
from attnres_fx.state_config import attention_config, shown_config
from attnres_fx.stream_reads import DepthRead


def load_foreign_(
    owner: nn.Module, attnres: AttnResParameters, folder: Path, style: CheckpointStyle, settings: Mapping[str, Any]
) -> None:
    """Read the queries and key gains of a checkpoint, and take on its output mode, eps and blocks.

    Args:
        owner: A converted or attached model, changed only when everything fits.
        attnres: Its parameters.
        folder: With safetensors files.
        style: Of the checkpoint.
        settings: Of the model whose checkpoint it is.

    Raises:
        SaveError: It does not fit the model, or is damaged.
    """
    _require_plain_form(attention_config(attnres.config, f"style {style.name!r}"), style)
    config = style.config(settings, attnres.config.streams)
    reads = list(attnres.reads)

    def width_of(place: int, count: int) -> int:
        if count != len(reads):
            raise SaveError(
                f"it has {count // 2} layers, {count} reads, and the model has {len(reads)} reads: a layer of such a "
                f"model is read twice, before its attention and before its MLP"
            )
        _require_plain_read(reads[place], place, count)
        return int(reads[place].width)

    pairs = read_pairs(folder, style, width_of)
    if config != attnres.config:
        reconfigure_(owner, attnres, config)
    with torch.no_grad():
        for read, (query, gain) in zip(reads, pairs, strict=True):
            for own, loaded in ((read.query, query), (read.key_weight, gain)):
                assert own is not None
                own.copy_(loaded)


def _require_plain_form(config: AttnResConfig, style: CheckpointStyle) -> None:
    """Raise SaveError for reads in a form that the checkpoints of a style do not have."""
    if config.form:
        raise SaveError(
            f"the reads of style {style.name!r} are plain ones, and the model has {shown_config(config)}: convert or "
            f"attach the original without {config.form[0]}"
        )


def _require_plain_read(read: DepthRead, place: int, count: int) -> None:
    """Raise SaveError for a read that is none of a stream of layers with two sublayers each, normed before each."""
    if read.gate is not None:
        raise SaveError(
            f"the read {read.name!r} has a gate: such a model has its norms before its sublayers, not behind"
        )
    layer = (place + 1) // 2
    numbers = [int(part) for part in read.name.split("#")[0].split(".") if part.isdecimal()]
    if numbers and place + 1 < count and layer not in numbers:
        raise SaveError(
            f"read {place + 1} of the model is {read.name!r}, and should be in layer {layer}: a layer of such a model "
            f"is read twice, and there is one stream"
        )


def export_foreign(owner: nn.Module, attnres: AttnResParameters, folder: Path, style_name: str) -> None:
    """Write the reads of a model as a checkpoint of another library has them.

    Args:
        owner: A converted or attached model.
        attnres: Its parameters.
        folder: Is made where it is not there. Other settings and files in it stay.
        style_name: `"kimi"` or `"fla"`.

    Raises:
        SaveError: The style cannot say what the model computes, or the folder cannot be written.
    """
    style, reads = style_named(style_name), list(attnres.reads)
    config = attention_config(attnres.config, f"style {style.name!r}")
    if config.output != "mean":
        raise SaveError(
            f"this {type(owner).__name__} has {shown_config(config)}: its reads are sums, and those of style "
            f"{style.name!r} are means. Their norms have an eps, so the same tensors would compute another function: "
            f"convert or attach with output='mean', and train that."
        )
    _require_plain_form(config, style)
    if config.variant == "local":
        raise SaveError(f"style {style.name!r} has no {shown_config(config)}: it knows blocks whose sums stay sources.")
    if len(reads) % 2 or not reads:
        raise SaveError(f"style {style.name!r} has two reads a layer, and the model has {len(reads)} reads.")
    for place, read in enumerate(reads):
        _require_plain_read(read, place, len(reads))
    settings = style.settings(_block_size(len(reads), config), config.eps)
    settings = {**_settings_there(folder), **settings}
    pairs = [(_plain(read, "query"), _plain(read, "key_weight")) for read in reads]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_container(folder / f"attnres_{style.name}.safetensors", {}, written_pairs(style, pairs))
        write_whole(folder / SETTINGS_FILE, lambda path: path.write_text(json.dumps(settings, indent=1) + "\n"))
    except OSError as error:
        raise SaveError(f"{folder} could not be written: {error}.") from error


def _plain(read: DepthRead, name: str) -> Tensor:
    return plain_tensor(f"attnres.reads.{read.name}.{name}", getattr(read, name))


def _block_size(count: int, config: AttnResConfig) -> int:
    """Sublayers of a block, of so many in all. Raises SaveError where blocks, the last aside, are not of one size."""
    starts = plan_schedule(count, config).starts
    size = starts[1] if len(starts) > 1 else count
    if starts != tuple(range(0, count, size)):
        raise SaveError(
            f"the blocks of {shown_config(config)} begin at {', '.join(map(str, starts))}, and such a "
            f"checkpoint says one size for all but the last: convert or attach with block_size=."
        )
    return size


def _settings_there(folder: Path) -> dict[str, Any]:
    """The settings that the folder holds already."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise SaveError(f"{path} is no JSON ({error}), and its settings would be lost.") from error
    if not isinstance(settings, dict):
        raise SaveError(f"{path} is no table of settings.")
    return settings
