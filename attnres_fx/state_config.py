"""What a state says of itself: the config that its parameters were made for, and the blocks that this gave."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_fx.config import AttnResConfig, RewriteConfig
from attnres_fx.errors import ConfigError

#: The options that decide the blocks; different ones can give the same.
_OF_BLOCKS = ("num_blocks", "block_size", "boundaries")
#: The length of a state's text is a multiple, so that states of different configs fit into each other's place.
_UNIT = 1024
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class StreamBlocks:
    """The blocks of one stream.

    Attributes:
        stream: Its name.
        starts: The first sublayer of each block, from 0.
        sublayers: How many it has.
    """

    stream: str
    starts: tuple[int, ...]
    sublayers: int

    def begins_as(self, other: "StreamBlocks") -> bool:
        """Whether the blocks are the same as far as both streams go."""
        both = min(self.sublayers, other.sublayers)
        return [s for s in self.starts if s < both] == [s for s in other.starts if s < both]


@dataclass(frozen=True)
class MadeFor:
    """What parameters were made for.

    Attributes:
        config: The options.
        blocks: What they gave for each stream; empty where nobody said.
    """

    config: RewriteConfig
    blocks: tuple[StreamBlocks, ...] = ()

    def differences(self, other: "MadeFor") -> list[str]:
        """The options by which the same parameters compute another function.

        Blocks are compared as they are, however they were asked for. Streams are not compared: their names are in the
        names of reads.
        """
        if type(self.config) is not type(other.config):
            return ["the class of the config"]
        differ = differing_options(self.config, other.config)
        asked = [n for n in _OF_BLOCKS if getattr(self.config, n, None) != getattr(other.config, n, None)]
        pairs = self._pairs(other)
        if not pairs:
            return differ + asked
        if all(mine.begins_as(theirs) for mine, theirs in pairs):
            return differ
        return differ + (asked or ["blocks"] * (not differ))

    def means_the_same(self, other: "MadeFor") -> bool:
        """Whether the same parameters compute the same function, also under another variant."""
        mine, theirs = self.config, other.config
        if not isinstance(mine, AttnResConfig) or not isinstance(theirs, AttnResConfig):
            return not self.differences(other)
        if any(n != "variant" for n in differing_options(mine, theirs)):
            return False
        names = {b.stream for b in self.blocks}
        if not names or names != {b.stream for b in other.blocks}:
            return False
        return all(_seen(self, mine) == _seen(other, theirs) for mine, theirs in self._pairs(other))

    def to_tensor(self) -> Tensor:
        """As JSON with a checksum, in bytes: [1024 or a multiple of it] uint8, filled up with spaces."""
        about = self.config.to_data() | {"blocks": [dataclasses.astuple(b) for b in self.blocks]}
        text = json.dumps(about | {_CHECKSUM: _checksum(about)}).encode()
        with torch.inference_mode(False):
            return torch.frombuffer(bytearray(text + b" " * (-len(text) % _UNIT)), dtype=torch.uint8)

    @staticmethod
    def from_tensor(state: Any) -> "MadeFor":
        """What `to_tensor` made. Raises ConfigError where it cannot be read."""
        try:
            about = json.loads(bytes(state.cpu().tolist()))
            checksum = about.pop(_CHECKSUM, None)
            if checksum is not None and checksum != _checksum(about):
                raise ValueError("its checksum does not fit")
            blocks = tuple(StreamBlocks(str(n), tuple(starts), int(c)) for n, starts, c in about.pop("blocks", ()))
            return MadeFor(RewriteConfig.class_in(about).from_data(about), blocks)
        except Exception as error:  # whatever stands there
            raise ConfigError(f"the state's config (attnres._extra_state) cannot be read: {error}") from error

    def _pairs(self, other: "MadeFor") -> list[tuple[StreamBlocks, StreamBlocks]]:
        theirs = {b.stream: b for b in other.blocks}
        return [(b, theirs[b.stream]) for b in self.blocks if b.stream in theirs]


def _seen(made_for: MadeFor, blocks: StreamBlocks) -> tuple[Any, ...]:
    """What decides the sources of a stream's reads: blocks of one sublayer, and one block of `local`, are `full`."""
    config = made_for.config
    assert isinstance(config, AttnResConfig)
    variant = config.variant
    one_each = variant == "block" and len(blocks.starts) == blocks.sublayers
    all_in_one = variant == "local" and len(blocks.starts) == 1
    if variant == "full" or one_each or all_in_one:
        return ("full", blocks.sublayers)
    return (variant, blocks.starts, blocks.sublayers)


def _checksum(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def attention_config(config: RewriteConfig, what: str) -> AttnResConfig:
    """A config of attention over depth, for what nothing else has.

    Args:
        config: Of a model.
        what: What needs it, as the beginning of the error.

    Raises:
        ConfigError: It is of another topology.
    """
    if not isinstance(config, AttnResConfig):
        raise ConfigError(
            f"{what} is there for attention over depth, and this is {shown_config(config)}: give an AttnResConfig."
        )
    return config


def differing_options(config: RewriteConfig, other: RewriteConfig) -> list[str]:
    """The options, but for those of blocks and streams, in which two configs of one class differ."""
    return [n for n in config.of_function if getattr(config, n) != getattr(other, n)]


def shown_config(config: RewriteConfig) -> str:
    """A config in words, with the options that are not the defaults.

    Args:
        config: Any config.

    Returns:
        What would make it again: `AttnResConfig(variant='block', output='sum', num_blocks=4)`.
    """
    assert dataclasses.is_dataclass(config)
    given = [f"{f.name}={getattr(config, f.name)!r}" for f in dataclasses.fields(config) if _is_given(config, f)]
    return f"{type(config).__name__}({', '.join(given)})"


def _is_given(config: RewriteConfig, field: Any) -> bool:
    return field.name in config.always_shown or getattr(config, field.name) != field.default
