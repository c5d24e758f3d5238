"""The modules that hold queries and key gains."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import ConfigError


class DepthRead(nn.Module):
    """Parameters of one read.

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
    """DepthRead modules in execution order; indexed by position or by read name."""

    def __init__(self, reads: list[DepthRead]) -> None:
        super().__init__()
        for read in reads:
            self.add_module(attribute_name(read.name), read)

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
        return tuple(read.name for read in self)

    def keys(self) -> tuple[str, ...]:
        return self.names

    def values(self) -> tuple[DepthRead, ...]:
        return tuple(self)

    def items(self) -> tuple[tuple[str, DepthRead], ...]:
        return tuple((read.name, read) for read in self)


class AttnResParameters(nn.Module):
    """Module that a conversion adds to a model, as `attnres`: its reads, and the config they are for."""

    def __init__(self, reads: list[DepthRead], config: AttnResConfig) -> None:
        super().__init__()
        self.config = config
        self.reads = DepthReads(reads)

    def get_extra_state(self) -> torch.Tensor:
        """The config, as bytes in a tensor, so that every format of checkpoint can hold it."""
        text = json.dumps(dataclasses.asdict(self.config))
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        try:
            self.config = AttnResConfig(**json.loads(bytes(state.cpu().tolist())))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the state's config (attnres._extra_state) cannot be read: {error}") from error

    def extra_repr(self) -> str:
        return f"variant={self.config.variant!r}, output={self.config.output!r}"


def attribute_name(read: str) -> str:
    """A read's name as a module attribute; module names hold no dots."""
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
