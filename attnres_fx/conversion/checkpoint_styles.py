"""Checkpoints of others: the names, shapes and settings under which they keep the queries and gains of their reads.

Each reads twice a decoder layer, before its attention and before its MLP, and once more before the final norm. The
first read sees one source, so its pair of tensors is there and never counts.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.stored.container import safetensors
from attnres_fx.errors import SaveError

#: The settings of a model, as Hugging Face folders have them.
SETTINGS_FILE = "config.json"
_SITES_A_LAYER = 2


@dataclass(frozen=True)
class CheckpointStyle:
    """How a family of checkpoints keeps its reads.

    Args:
        name: Of the style.
        sites: What stands before `_proj.weight` [1, D] and `_norm.weight` [D] of a layer: of its two reads.
        last: The same for the model's last read.
        block_setting: The setting that says how long a block is.
        sublayers: How many sublayers it counts as one.
        eps_setting: The setting that holds eps.
    """

    name: str
    sites: tuple[str, str]
    last: str
    block_setting: str
    sublayers: int
    eps_setting: str

    def config(self, settings: Mapping[str, Any], streams: Any) -> AttnResConfig:
        """The config under which reads are theirs: means, with their eps and blocks.

        Raises:
            SaveError: A setting is missing, or makes no sense.
        """
        size, eps = settings[self.block_setting], settings.get(self.eps_setting)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise SaveError(f"{SETTINGS_FILE} has {self.block_setting}={size!r:.40}; it must be a whole number above 0")
        if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 <= eps < 1:
            raise SaveError(f"{SETTINGS_FILE} has {self.eps_setting}={eps!r:.40}; it must be a small number")
        return AttnResConfig(block_size=size * self.sublayers, output="mean", eps=float(eps), streams=streams)

    def settings(self, block_size: int, eps: float) -> dict[str, Any]:
        """What `config` reads, for blocks of this many sublayers.

        Raises:
            SaveError: The style cannot say such blocks.
        """
        units, rest = divmod(block_size, self.sublayers)
        if rest:
            raise SaveError(
                f"style {self.name!r} counts blocks in layers of {self.sublayers} sublayers, not {block_size}"
            )
        return {self.block_setting: units, self.eps_setting: eps}

    def names(self, layers: int) -> list[str]:
        """The stem of every pair of tensors, in the order of the reads, the one that never counts first."""
        return [*(f"layers.{i}.{site}" for i in range(layers) for site in self.sites), self.last]

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the name of a tensor of a read: what stands before, the stem, and which of the two it is."""
        sites = rf"layers\.\d+\.(?:{'|'.join(self.sites)})|{self.last}"
        return re.compile(rf"(?P<before>(?:.*\.)?)(?P<stem>{sites})_(?P<which>proj|norm)\.weight")


STYLES = {
    style.name: style
    for style in (
        CheckpointStyle(
            "kimi", ("self_attention_res", "mlp_res"), "output_attn_res", "attn_res_block_size", 2, "rms_norm_eps"
        ),
        CheckpointStyle("fla", ("attn_res", "mlp_res"), "res", "attnres_block_size", 1, "norm_eps"),
    )
}


def style_named(name: object) -> CheckpointStyle:
    """The style of a name. Raises SaveError where there is none."""
    if not isinstance(name, str) or name not in STYLES:
        raise SaveError(f"style must be one of {', '.join(map(repr, STYLES))}; it is {name!r:.40}.")
    return STYLES[name]


def known_settings() -> str:
    """The settings by which the checkpoint of a style is known, in words."""
    return " or ".join(f"{s.block_setting} ({s.name})" for s in STYLES.values())


def found_style(folder: Path) -> tuple[CheckpointStyle, Mapping[str, Any]] | None:
    """The style of the checkpoint in a folder, and the table that holds its settings; None where it is no such folder.

    Raises:
        SaveError: Its settings fit more than one style.
    """
    if not (folder / SETTINGS_FILE).is_file():
        return None
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    if not isinstance(settings, dict):
        raise SaveError(f"{SETTINGS_FILE} is no table")
    # A model of text and images has the settings of each part in a table of its own.
    tables = [settings, *(v for v in settings.values() if isinstance(v, dict))]
    found = [(s, t) for t in tables for s in STYLES.values() if t.get(s.block_setting) is not None]
    if len(found) > 1:
        raise SaveError(f"{SETTINGS_FILE} has blocks of {len(found)} kinds: {', '.join(s.name for s, _ in found)}")
    return found[0] if found else None


def read_pairs(
    folder: Path, style: CheckpointStyle, width_of: Callable[[int, int], int]
) -> list[tuple[Tensor, Tensor]]:
    """Query and key gain, both [D], of each read that counts, in execution order.

    Args:
        folder: Holds safetensors files; tensors that belong to no read are not read.
        style: Of the checkpoint.
        width_of: Takes the place of a read and how many there are; gives its D, or raises SaveError.

    Returns:
        Two pairs a layer.

    Raises:
        SaveError: Tensors are missing, are there twice or have other shapes.
    """
    with _tensors_in(folder, style) as found:
        before = {b for b, _ in found}
        if len(before) != 1:
            words = "no" if not found else f"{len(before)} sets of"
            raise SaveError(f"it has {words} tensors of reads in style {style.name!r} (such as {_example(style)})")
        layers = len({stem for _, stem in found} - {style.last}) // _SITES_A_LAYER
        stems = style.names(max(layers, 1))
        (start,) = before
        for _, stem in sorted(found):
            if stem not in stems:
                raise SaveError(f"it has the tensor {start}{stem}_proj.weight, and lacks a layer before it")
        pairs = []
        for i, stem in enumerate(stems[1:]):
            width = width_of(i, len(stems) - 1)
            query = _taken(found, start, stem, "proj", (1, width))
            pairs.append((query.flatten(), _taken(found, start, stem, "norm", (width,))))
        return pairs


#: A file's slice of a tensor, which knows its shape before it is read, and a function that reads it, by their place.
_Found = dict[tuple[str, str], dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]]


@contextmanager
def _tensors_in(folder: Path, style: CheckpointStyle) -> Iterator[_Found]:
    """The tensors of reads in a folder's files, by what stands before, stem, and which of the two it is."""
    package, found = safetensors(), _Found()
    with ExitStack() as stack:
        for path in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(package.safe_open(path, framework="pt", device="cpu"))
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                if (match := style.pattern.fullmatch(name)) is None:
                    continue
                pair = found.setdefault((match["before"], match["stem"]), {})
                if match["which"] in pair:
                    raise SaveError(f"more than one file has the tensor {name!r:.80}")
                shape = tuple(opened.get_slice(name).get_shape())
                pair[match["which"]] = shape, _reader(opened, name)
        yield found


def _reader(opened: Any, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor: Tensor = opened.get_tensor(name)
        return tensor

    return read


def _taken(found: _Found, start: str, stem: str, which: str, shape: tuple[int, ...]) -> Tensor:
    name = f"{start}{stem}_{which}.weight"
    held = found.get((start, stem), {}).get(which)
    if held is None:
        raise SaveError(f"it lacks the tensor {name!r}")
    if held[0] != shape:
        raise SaveError(f"{name!r} is {list(held[0])}; a read of this model needs {list(shape)}")
    tensor = held[1]()
    if not tensor.is_floating_point():
        raise SaveError(f"{name!r} holds {tensor.dtype}; it must be floating point")
    return tensor


def written_pairs(style: CheckpointStyle, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, from query and key gain of each read: the inverse of `read_pairs`."""
    query, gain = pairs[0]
    unread = torch.zeros_like(query), torch.ones_like(gain)
    stems = style.names(len(pairs) // _SITES_A_LAYER)
    tensors = {}
    for stem, (query, gain) in zip(stems, [unread, *pairs], strict=True):
        tensors[f"model.{stem}_proj.weight"] = query.unsqueeze(0)
        tensors[f"model.{stem}_norm.weight"] = gain
    return tensors


def _example(style: CheckpointStyle) -> str:
    return f"model.layers.0.{style.sites[1]}_proj.weight"
