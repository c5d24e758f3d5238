"""The modules that hold queries and key gains."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import ConfigError
from attnres_fx.shown import brief


class DepthRead(nn.Module):
    """Parameters of one read.

    Args:
        name: Of the read.
        width: D, the elements of the query and of the key gain.
        gated: Whether the read has a gate.
        dtype: Of all three; by default torch's default dtype.
        device: Where they are; by default torch's default device.

    Attributes:
        name: Of the read.
        query: [D], zero at first.
        key_weight: [D], one at first.
        gate: A scalar, zero at first, on reads of a post-norm stream in mode `"sum"`; None on others.
    """

    def __init__(
        self,
        name: str,
        width: int,
        *,
        gated: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.query = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
        self.key_weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))
        self.gate = nn.Parameter(torch.zeros((), dtype=dtype, device=device)) if gated else None

    def extra_repr(self) -> str:
        return f"{self.name!r}, width={self.query.shape[0]}" + (", gated" if self.gate is not None else "")


class DepthReads(nn.Module):
    """DepthRead modules in execution order; indexed by position or by read name.

    Args:
        reads: In execution order, with distinct names.
    """

    def __init__(self, reads: list[DepthRead]) -> None:
        super().__init__()
        for read in reads:
            self.add_module(attribute_name(read.name), read)

    def __repr__(self) -> str:
        return brief(super().__repr__(), "see .names", 2_000)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[DepthRead]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            return self._modules[attribute_name(key)]
        return list(self)[key]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and attribute_name(name) in self._modules

    @property
    def names(self) -> tuple[str, ...]:
        """The name of every read, in execution order."""
        return tuple(read.name for read in self)

    def keys(self) -> tuple[str, ...]:
        """The same as `names`, as a dict has it."""
        return self.names

    def values(self) -> tuple[DepthRead, ...]:
        """The reads, in execution order."""
        return tuple(self)

    def items(self) -> tuple[tuple[str, DepthRead], ...]:
        """Name and read, in execution order."""
        return tuple((read.name, read) for read in self)


class AttnResParameters(nn.Module):
    """Module that a conversion adds to a model, as `attnres`: its reads, and the config they are for.

    Args:
        reads: In execution order.
        config: What they were made for.

    Attributes:
        reads: A `DepthReads`.
        config: What they were made for.
    """

    def __init__(self, reads: list[DepthRead], config: AttnResConfig) -> None:
        super().__init__()
        self.config = config
        self.reads = DepthReads(reads)

    def set_config(self, config: AttnResConfig) -> None:
        """Let the parameters be for another config, under which the reads are the same.

        Args:
            config: The other config.
        """
        self.config = config

    def get_extra_state(self) -> torch.Tensor:
        """The config, as bytes in a tensor, so that every format of checkpoint can hold it.

        Returns:
            [bytes] uint8: the config as JSON.
        """
        text = json.dumps(dataclasses.asdict(self.config))
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Compare the config of a state with this one's: under another config the parameters mean nothing.

        Args:
            state: What `get_extra_state` returned.

        Raises:
            ConfigError: The configs differ, and both are named; or the state cannot be read. The parameters are left
                as they are.
        """
        found = _config_in(state)
        if different := different_options(found, self.config):
            raise ConfigError(
                f"the state was made with {shown_config(found)}, and this model with {shown_config(self.config)}: the "
                f"same parameters would compute another function ({', '.join(different)}). Convert or attach the "
                f"original with the config of the state, and load it then."
            )

    def extra_repr(self) -> str:
        return f"variant={self.config.variant!r}, output={self.config.output!r}"


#: What decides which sources a read sees, and what it makes of them; names of streams are in the names of reads.
_DECIDING = ("variant", "num_blocks", "block_size", "boundaries", "output", "eps")


def _config_in(state: Any) -> AttnResConfig:
    try:
        return AttnResConfig(**json.loads(bytes(state.cpu().tolist())))
    except Exception as error:  # whatever stands there
        raise ConfigError(f"the state's config (attnres._extra_state) cannot be read: {error}") from error


def different_options(one: AttnResConfig, other: AttnResConfig) -> list[str]:
    """The options by which the same parameters compute another function.

    Args:
        one: A config.
        other: The config to compare it with.

    Returns:
        Names of the fields that differ; `streams` is not among them.
    """
    return [n for n in _DECIDING if getattr(one, n) != getattr(other, n)]


def shown_config(config: AttnResConfig) -> str:
    """A config in words, with the options that are not the defaults.

    Args:
        config: Any config.

    Returns:
        What would make it again: `AttnResConfig(variant='block', output='sum', num_blocks=4)`.
    """
    given = [f"{f.name}={getattr(config, f.name)!r}" for f in dataclasses.fields(config) if _is_given(config, f)]
    return f"AttnResConfig({', '.join(given)})"


def _is_given(config: AttnResConfig, field: Any) -> bool:
    return field.name in ("variant", "output") or getattr(config, field.name) != field.default


def check_state(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Compare the config in a state with that of a model, before anything is loaded.

    Args:
        model: With `attnres` parameters.
        state_dict: A state that may have been made with another config.
        prefix: Of the model's own names in it.

    Raises:
        ConfigError: The configs differ, and both are named.
    """
    attnres = model._modules.get("attnres")
    state = state_dict.get(f"{prefix}attnres._extra_state")
    if isinstance(attnres, AttnResParameters) and state is not None:
        attnres.set_extra_state(state)


def attribute_name(read: str) -> str:
    """A read's name as the name of a module, which can hold no dots.

    Args:
        read: Name of the read.

    Returns:
        The name with `__` for each dot.
    """
    return read.replace(".", "__")


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two optimizer groups: the model's own parameters, and its queries, gains and gates without weight decay.

    Args:
        model: A module with `attnres` parameters.

    Returns:
        Groups for a `torch.optim` optimizer; the first takes the optimizer's own weight decay.
    """
    named = list(model.named_parameters())
    added = [p for n, p in named if "attnres" in n.split(".")]
    own = [p for n, p in named if "attnres" not in n.split(".")]
    return [{"params": own}, {"params": added, "weight_decay": 0.0}]
