"""What a conversion adds to a model, as one module: its reads, and the config that they were made for."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnres_fx.config import RewriteConfig
from attnres_fx.errors import ConfigError
from attnres_fx.state_config import MadeFor, StreamBlocks, shown_config
from attnres_fx.stream_reads import DepthReads, StreamRead

#: The name of the config in the state of a model.
STATE_KEY = "attnres._extra_state"


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
