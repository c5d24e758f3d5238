"""The modules that hold what a conversion adds: queries, key gains and gates, or what another topology has."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from attnres_fx.config import AttnResConfig, RewriteConfig
from attnres_fx.errors import ConfigError
from attnres_fx.shown import brief
from attnres_fx.state_config import MadeFor, StreamBlocks, shown_config

#: The name of the config in the state of a model.
STATE_KEY = "attnres._extra_state"


class StreamRead(nn.Module):
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

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the read has of `tensor_names`, in that order."""
        held = {name: getattr(self, name) for name in self.tensor_names}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def initial(self, name: str) -> torch.Tensor:
        """What a parameter is when a conversion made it.

        Args:
            name: One of `tensors()`.

        Returns:
            A new tensor of its shape.
        """
        raise NotImplementedError

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
        config = config or AttnResConfig()

        def held(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        query = (width, width) if config.query == "input" else (width,)
        self.query = held(*query) if config.has_queries else None
        self.key_weight = held(width) if config.has_queries else None
        self.gate = held() if gated else None
        self.bias = held(num_sources) if config.has_biases else None
        self.start_()

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


class AttnResParameters(nn.Module):
    """Module that a conversion adds to a model, as `attnres`: its reads, and the config they are for.

    Args:
        reads: In execution order.
        config: What they were made for.
        blocks: Of each stream, as the config gave them.

    Attributes:
        reads: A `DepthReads`.
        config: What they were made for.
        made_for: The same, with the blocks of each stream.
    """

    def __init__(
        self, reads: Sequence[StreamRead], config: RewriteConfig, blocks: tuple[StreamBlocks, ...] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.made_for = MadeFor(config, blocks)
        self.reads = DepthReads(reads)
        self._written = self.made_for.to_tensor()
        self._compared = _version(self._written)

    def set_made_for(self, made_for: MadeFor) -> None:
        """Let the parameters be for another config, under which the reads are the same.

        Args:
            made_for: The other config, and its blocks.
        """
        self.config, self.made_for = made_for.config, made_for
        self._written = made_for.to_tensor()
        self._compared = _version(self._written)

    def get_extra_state(self) -> torch.Tensor:
        """The config, as bytes in a tensor, so that every format of checkpoint can hold it.

        It is the module's own tensor: what loads into the tensors of `state_dict()` in place writes to it, and the
        next call or save compares it.

        Returns:
            [bytes] uint8: the config and the blocks as JSON.
        """
        if not torch.equal(self._written, self.made_for.to_tensor()) and self._written_for() is None:
            self._written = self.made_for.to_tensor()  # an average of states, say
        return self._written

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Compare the config of a state with this one's: under another config the parameters mean nothing.

        Args:
            state: What `get_extra_state` returned.

        Raises:
            ConfigError: The configs differ, and both are named; or the state cannot be read. The parameters are left
                as they are.
        """
        self._compare(MadeFor.from_tensor(state), "the state was")
        self._written = self.made_for.to_tensor()

    def check_written(self) -> None:
        """Raise ConfigError where a state of another config was written into the tensors of `state_dict()`."""
        if self._compared != (now := _version(self._written)):
            if (found := self._written_for()) is not None:
                self._compare(found, "what was loaded in place (torch.distributed.checkpoint.load) was")
            self._compared = now

    def _written_for(self) -> MadeFor | None:
        """What the module's own tensor says now; None where it says nothing."""
        try:
            return MadeFor.from_tensor(self._written)
        except ConfigError:
            return None

    def _compare(self, found: MadeFor, what: str) -> None:
        different = found.differences(self.made_for)
        if not different:
            return
        both = f"{what} made with {shown_config(found.config)}, and this model with {shown_config(self.config)}"
        if found.means_the_same(self.made_for):
            raise ConfigError(
                f"{both}. Here both mean the same function: attnres_fx.convert_state(state, model) gives the state as "
                f"this model has it ({', '.join(different)} differs), and load_state_dict takes that."
            )
        raise ConfigError(
            f"{both}: the same parameters would compute another function ({', '.join(different)}). Convert or attach "
            f"the original with the config of the state, and load it then."
        )

    def extra_repr(self) -> str:
        shown = (*self.config.always_shown, *self.config.form)
        return ", ".join(f"{name}={getattr(self.config, name)!r}" for name in shown)


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes when a tensor is written to, and from copy to copy."""
    return id(tensor), tensor._version


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
    if not isinstance(attnres, AttnResParameters):
        return
    state = state_dict.get(f"{prefix}{STATE_KEY}")
    if state is not None:
        attnres.set_extra_state(state)
    elif any(name.startswith(f"{prefix}attnres.") for name in state_dict):
        warnings.warn(
            f"the state has parameters of attnres_fx, not the config they were made with ({prefix}{STATE_KEY}). If it "
            f"was another than {shown_config(attnres.config)}, the model computes another function now: save "
            f"state_dict() whole, or use save_adapter.",
            stacklevel=2,
        )


def convert_state(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state as a model has it whose config means the same blocks, though it asks for them in other words.

    `full`, blocks of one sublayer and one block of `local` are the same function of the same parameters; so are equal
    blocks by `num_blocks`, `block_size` and `boundaries`, which `load_state_dict` takes as they are.

    Args:
        state_dict: Of a converted or attached model, or of one that wraps one as `model` is wrapped.
        model: The model that it is for, which is left as it is.

    Returns:
        The same tensors, with the config of `model`; `model.load_state_dict` takes it.

    Raises:
        ConfigError: The configs mean different functions, the state says nothing of its config, or the model has no
            `attnres` parameters.
    """
    converted = dict(state_dict)
    owners = [(n, m) for n, m in model.named_modules() if isinstance(m, AttnResParameters)]
    if not owners:
        raise ConfigError(f"this {type(model).__name__} has no attnres parameters: give a converted or attached model.")
    for path, attnres in owners:
        key = f"{path}._extra_state"
        if key not in converted:
            raise ConfigError(f"the state has no {key}, so nothing says what it was made for: save state_dict() whole.")
        found = MadeFor.from_tensor(converted[key])
        if found.differences(attnres.made_for) and not found.means_the_same(attnres.made_for):
            raise ConfigError(
                f"the state was made with {shown_config(found.config)}, and this model with "
                f"{shown_config(attnres.config)}, which show reads other sources here: no state of the one is a state "
                f"of the other. Convert or attach the original with the config of the state."
            )
        converted[key] = attnres.made_for.to_tensor()
    return converted


def attribute_name(read: str) -> str:
    """A read's name as the name of a module, which can hold no dots.

    Args:
        read: Name of the read.

    Returns:
        The name with `__` for each dot.
    """
    return read.replace(".", "__")
