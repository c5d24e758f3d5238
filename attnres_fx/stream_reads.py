"""The modules that hold what a conversion adds at one read: a query, a key gain, a gate, or what a topology has."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from attnres_fx.config import AttnResConfig
from attnres_fx.shown import brief


class StreamRead(nn.Module, ABC):
    """Parameters of one place where a stream is read: the base of `DepthRead` and of other topologies' modules.

    Args:
        name: Of the read.
        width: D, the elements of the stream's last dimension.

    Attributes:
        name: Of the read.
        width: D.
        gate: A scalar, on reads that move a post-norm state; None on others.
        tensor_names: The attributes that may hold a parameter, in the order in which a graph is given them.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ()
    gate: nn.Parameter | None

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.width = width

    def hold_(self, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype | None, device: Any) -> None:
        """Register the parameters, as a conversion starts with them, in place.

        Args:
            shapes: Of those that the read has, by name; the others of `tensor_names` are None.
            dtype: Of all of them; None for torch's default dtype.
            device: Where they are; None for torch's default device.
        """
        for name in self.tensor_names:
            empty = torch.empty(shapes[name], dtype=dtype, device=device) if name in shapes else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.start_()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the read has of `tensor_names`, in that order."""
        held = {name: getattr(self, name) for name in self.tensor_names}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @abstractmethod
    def initial(self, name: str) -> torch.Tensor:
        """What a parameter is when a conversion made it.

        Args:
            name: One of `tensors()`.

        Returns:
            A new tensor of its shape.
        """

    def start_(self) -> None:
        """Set every parameter to what a conversion starts with, in place."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(self.initial(name))

    def described(self) -> list[Any]:
        """What makes the same module again, as plain data: the name, D, whether there is a gate, and what follows."""
        return [self.name, self.width, self.gate is not None]


class DepthRead(StreamRead):
    """Parameters of one read.

    Args:
        name: Of the read.
        width: D, the elements of the stream's rows.
        gated: Whether the read has a gate.
        config: Which parameters it has; None for a query and a key gain.
        num_sources: S, of a read with a bias.
        dtype: Of all of them; by default torch's default dtype.
        device: Where they are; by default torch's default device.

    Attributes:
        name: Of the read.
        width: D.
        query: [D], of `query="input"` [D, D], zero at first; None with static weights.
        key_weight: [D], one at first; None with static weights.
        gate: A scalar, zero at first, on reads of a post-norm stream in mode `"sum"`; None on others.
        bias: [S], zero at first, with `source_bias` or static weights; None on others.
    """

    tensor_names = ("query", "key_weight", "gate", "bias")
    query: nn.Parameter | None
    key_weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        name: str,
        width: int,
        *,
        gated: bool = False,
        config: AttnResConfig | None = None,
        num_sources: int = 0,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(name, width)
        shapes = depth_read_shapes(width, config or AttnResConfig(), gated=gated, num_sources=num_sources)
        self.hold_(shapes, dtype=dtype, device=device)

    def initial(self, name: str) -> torch.Tensor:
        """One for the key gain, zero for all else: see `StreamRead.initial`."""
        held: torch.Tensor = getattr(self, name)
        return torch.ones_like(held) if name == "key_weight" else torch.zeros_like(held)

    def described(self) -> list[Any]:
        """See `StreamRead.described`; of a read with a bias, how many sources it is for follows."""
        return [*super().described(), *([] if self.bias is None else [len(self.bias)])]

    def extra_repr(self) -> str:
        kinds = [", gated" if self.gate is not None else "", ", biased" if self.bias is not None else ""]
        return f"{self.name!r}, width={self.width}" + "".join(kinds)


def depth_read_shapes(
    width: int, config: AttnResConfig, *, gated: bool, num_sources: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of a depth read, by name; for the arguments see `DepthRead`."""
    shapes: dict[str, tuple[int, ...]] = {}
    if config.has_queries:
        shapes = {"query": (width, width) if config.query == "input" else (width,), "key_weight": (width,)}
    if gated:
        shapes["gate"] = ()
    if config.has_biases:
        shapes["bias"] = (num_sources,)
    return shapes


class DepthReads(nn.Module):
    """The modules of all reads in execution order; indexed by position or by read name.

    Args:
        reads: In execution order, with distinct names.
    """

    def __init__(self, reads: Sequence[StreamRead]) -> None:
        super().__init__()
        for read in reads:
            self.add_module(attribute_name(read.name), read)

    def __repr__(self) -> str:
        return brief(super().__repr__(), "see .names", 2_000)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

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

    def values(self) -> tuple[Any, ...]:
        """The reads, in execution order."""
        return tuple(self)

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Name and read, in execution order."""
        return tuple((read.name, read) for read in self)


def attribute_name(read: str) -> str:
    """A read's name as the name of a module, which can hold no dots.

    Args:
        read: Name of the read.

    Returns:
        The name with `__` for each dot.
    """
    return read.replace(".", "__")
