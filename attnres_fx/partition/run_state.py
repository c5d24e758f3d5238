"""Where a training run is, beside weights and optimizer: its step, its random states, its scheduler and the like.

In a checkpoint folder they are `run.step`, `run.random.<processes>.<rank>.<device>` and `run.others.<name>`.
"""

import io
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from attnres_fx.errors import PipelineError, SaveError

STEP, _RANDOM, _OTHER = "run.step", "run.random.{}.{}.", "run.others.{}"

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """What has a state of its own: a learning-rate scheduler, a gradient scaler, a data loader that can resume."""

    def state_dict(self) -> Any:
        """The state, of numbers, texts, tensors, and lists and dicts of them."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take a state on."""


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint said of the run that wrote it.

    Attributes:
        step: As it was given to the save; None where it was not.
        random: Whether every process has the random state that it had then.
    """

    step: int | None = None
    random: bool = False


def run_state(step: int | None, others: Mapping[str, Stateful] | None) -> dict[str, Any]:
    """The entries of this process.

    Args:
        step: Of the run; None leaves it out.
        others: Objects by name, in the same state on every rank.

    Raises:
        SaveError: The state of one holds more than plain data.
        PipelineError: An object has no state.
    """
    state: dict[str, Any] = {} if step is None else {STEP: int(step)}
    for name, other in (others or {}).items():
        _require_stateful(name, other)
        state[_OTHER.format(name)] = _in_bytes(name, other.state_dict())
    prefix = _random_prefix()
    return state | {prefix + device: value for device, value in _random_states().items()}


def room_for_run(written: Mapping[str, Any], others: Mapping[str, Stateful] | None, *, random: bool) -> dict[str, Any]:
    """Where to read the entries of this process into.

    Args:
        written: What the checkpoint has, by name.
        others: Objects by name.
        random: Whether random states are wanted.

    Raises:
        PipelineError: The checkpoint has no state of one of the objects, or an object takes none.
    """
    room: dict[str, Any] = {STEP: None} if STEP in written else {}
    wanted = {name: _OTHER.format(name) for name in others or {}}
    for name, key in wanted.items():
        _require_stateful(name, (others or {})[name])
        if key not in written:
            known = [k.removeprefix(_OTHER.format("")) for k in written if k.startswith(_OTHER.format(""))]
            raise PipelineError(
                f"the checkpoint has no state of {name!r} (it has {', '.join(known) or 'none'}): give it to save() too."
            )
    keys = list(wanted.values())
    if random:
        keys += [key for key in written if key.startswith(_random_prefix())]
    for key in keys:
        what = written[key]
        assert isinstance(what, TensorStorageMetadata)
        room[key] = torch.empty(what.size, dtype=what.properties.dtype)
    return room


def restore_run(state: Mapping[str, Any], others: Mapping[str, Stateful] | None, *, random: bool) -> Loaded:
    """Give objects and generators what was read into `room_for_run`."""
    for name, other in (others or {}).items():
        other.load_state_dict(_from_bytes(state[_OTHER.format(name)]))
    prefix = _random_prefix()
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if random and not found:
        log.warning(
            "the checkpoint was written by another number of processes: random states are as they are, so that dropout "
            "draws other numbers than an uninterrupted run"
        )
    if random:
        for device, value in found.items():
            _set_random_state(device, value)
    return Loaded(state.get(STEP), random and bool(found))


def _require_stateful(name: str, other: Any) -> None:
    if not callable(getattr(other, "state_dict", None)) or not callable(getattr(other, "load_state_dict", None)):
        raise PipelineError(f"others[{name!r}] is a {type(other).__name__}, which has no state_dict to save or load.")


def _in_bytes(name: str, state: Any) -> Tensor:
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        raise SaveError(
            f"the state of {name!r} holds more than numbers, texts, tensors and lists of them, which a checkpoint "
            f"could not give back: {error}"
        ) from error
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return torch.load(io.BytesIO(bytes(data.tolist())), weights_only=True)


def _random_prefix() -> str:
    """Of this process's random states: those of a run of as many processes as this one."""
    ready = dist.is_initialized()
    return _RANDOM.format(dist.get_world_size() if ready else 1, dist.get_rank() if ready else 0)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _set_random_state(device: str, state: Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    elif (present := torch.accelerator.current_accelerator(check_available=True)) and present.type == device:
        torch.get_device_module(device).set_rng_state(state)
