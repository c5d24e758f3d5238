"""Checkpoints by original parameter names, through `torch.distributed.checkpoint`.

Whoever saves, whoever loads: stages of a pipeline of any width, or the unsplit model. A name says what a tensor is;
which rank holds it, and in which shards, is no part of the file. Keys are `model.<name>`,
`optimizer.state.<name>.<what>` and `optimizer.param_groups.<name>.<option>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from attnres_fx.errors import PipelineError

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Parts:
    """modules: what one rank holds of a model. aliases: groups of names that are one parameter of the model."""

    modules: tuple[nn.Module, ...]
    aliases: tuple[tuple[str, ...], ...] = ()

    def name(self, parameter: Tensor) -> str:
        """Original name of a parameter that is held here."""
        for module in self.modules:
            for name, held in module.named_parameters():
                if held is parameter:
                    return name
        raise PipelineError("the optimizer has a parameter that is not this rank's: give it pipeline.parameters().")

    def names_of(self, name: str) -> tuple[str, ...]:
        """All names of a parameter, the one it is saved under in an optimizer's state first."""
        return next((tuple(dict.fromkeys(group)) for group in self.aliases if name in group), (name,))


def merged_state(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of several stages under their original names."""
    return {name: value for module in modules for name, value in module.state_dict().items()}


def save_checkpoint(path: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Write a checkpoint of an unsplit model, which pipelines of any width can load."""
    save_modules(path, whole(model), optimizer)


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Read a checkpoint into an unsplit model, in place, whatever it was saved from."""
    load_modules(path, whole(model), optimizer)


def whole(model: nn.Module) -> Parts:
    """An unsplit model as the only part of itself."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return Parts((model,), tuple(tuple(group) for group in names.values() if len(group) > 1))


def save_modules(path: str | Path, parts: Parts, optimizer: Optimizer | None) -> None:
    """Write what every rank holds; all ranks call it."""
    state: dict[str, Any] = {f"model.{name}": value for name, value in merged_state(parts.modules).items()}
    for parameter, group in _optimized(optimizer):
        name = parts.names_of(parts.name(parameter))[0]
        options = {key: value for key, value in group.items() if key != "params"}
        kept = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        state |= {f"optimizer.param_groups.{name}.{key}": value for key, value in options.items()}
        state |= {f"optimizer.state.{name}.{key}": value for key, value in kept.items()}
    dcp.save(state, checkpoint_id=str(path))


def load_modules(path: str | Path, parts: Parts, optimizer: Optimizer | None) -> None:
    """Read what every rank holds, in place; all ranks call it."""
    written = _read_names(path)
    model = merged_state(parts.modules)
    # A tied parameter is there under any one of its names.
    keys = {name: _first_of(parts.names_of(name), "model.{}", written, name) for name in model}
    missing = sorted(name for name, key in keys.items() if key not in written)
    if missing:
        raise PipelineError(
            f"the checkpoint {str(path)!r} has no {missing[0]!r} ({len(missing)} names are missing): it is of another "
            f"model, or of one converted with another config."
        )
    state: dict[str, Any] = {}
    for name, key in keys.items():
        state.setdefault(key, model[name])
    found = {
        parameter: _first_of(names, "optimizer.param_groups.{}.lr", written, names[0]).split(".", 2)[2][:-3]
        for parameter, _ in _optimized(optimizer)
        for names in [parts.names_of(parts.name(parameter))]
    }
    for parameter, name in found.items():
        state |= _template(parameter, name, written)
    dcp.load(state, checkpoint_id=str(path))
    with torch.no_grad():
        for name, key in keys.items():
            if state[key] is not model[name]:
                model[name].copy_(state[key])
    if optimizer is not None:
        _restore(optimizer, found, state)


def _optimized(optimizer: Optimizer | None) -> list[tuple[Tensor, dict[str, Any]]]:
    """Every parameter of an optimizer, with its group."""
    return [] if optimizer is None else [(p, group) for group in optimizer.param_groups for p in group["params"]]


def _read_names(path: str | Path) -> dict[str, Any]:
    try:
        return dict(dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata)
    except OSError as error:
        raise PipelineError(
            f"there is no whole checkpoint at {str(path)!r} ({error}): give the folder that save() wrote; one that "
            f"was being written when the job ended has no .metadata file and cannot be used."
        ) from error


def _first_of(names: Sequence[str], pattern: str, written: dict[str, Any], otherwise: str) -> str:
    keys = [pattern.format(name) for name in (otherwise, *names)]
    return next((key for key in keys if key in written), keys[0])


def _template(parameter: Tensor, name: str, written: dict[str, Any]) -> dict[str, Any]:
    """Room for what the checkpoint has of a parameter's optimizer state: sharded as it is where it has its shape."""
    room: dict[str, Any] = {}
    for key, what in written.items():
        if not key.startswith((f"optimizer.state.{name}.", f"optimizer.param_groups.{name}.")):
            continue
        if not isinstance(what, TensorStorageMetadata):
            room[key] = None
        elif what.size == parameter.shape:
            room[key] = torch.zeros_like(parameter, dtype=what.properties.dtype, requires_grad=False)
        else:
            room[key] = torch.zeros(what.size, dtype=what.properties.dtype)
    return room


def _restore(optimizer: Optimizer, names: dict[Tensor, str], state: dict[str, Any]) -> None:
    """Put what was read where the optimizer keeps it; parameters the checkpoint knows nothing of start afresh."""
    whole = optimizer.state_dict()
    number = 0
    for group in whole["param_groups"]:
        for index, _ in enumerate(group["params"]):
            parameter = optimizer.param_groups[whole["param_groups"].index(group)]["params"][index]
            kept, options = (
                {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                for prefix in (f"optimizer.state.{names[parameter]}.", f"optimizer.param_groups.{names[parameter]}.")
            )
            if kept:
                whole["state"][group["params"][index]] = kept
            if index == 0:
                group |= options
            number += 1
    optimizer.load_state_dict(whole)
