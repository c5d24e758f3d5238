"""Checkpoints by original parameter names, through `torch.distributed.checkpoint`.

Stages of a pipeline of any width, or the unsplit model, save and load the same files. A tensor is known by its name;
which rank holds it, and in which shards, is no part of the file. Keys are `model.<name>`,
`optimizer.state.<name>.<entry>` and `optimizer.param_groups.<name>.<option>`, as PyTorch's flattened optimizer state
has them. Its own functions take one model with one optimizer, and a parameter by one name: here an optimizer covers
several stages, and a tied parameter may be saved under a name that the loading stage does not have.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from attnres_fx.errors import ConfigError, PipelineError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.partition.checkpoint_folder import FolderReader, FolderWriter, PlainLoadPlanner, in_words
from attnres_fx.partition.optimizer_state import restore_optimizer, room_for
from attnres_fx.partition.run_state import Loaded, Stateful, restore_run, room_for_run, run_state
from attnres_fx.state_config import MadeFor, shown_config

Optimizer = torch.optim.Optimizer
_STATE, _OPTIONS = "optimizer.state.{}.", "optimizer.param_groups.{}."


@dataclass(frozen=True)
class Parts:
    """The parts of a model on one rank.

    Attributes:
        modules: The rank's.
        aliases: Groups of names that are one parameter of the model.
        made_for: The configs that the model was converted with, each by its name in the model's state.
    """

    modules: tuple[nn.Module, ...]
    aliases: tuple[tuple[str, ...], ...] = ()
    made_for: Mapping[str, MadeFor] = field(default_factory=dict)

    def names_of(self, name: str) -> tuple[str, ...]:
        """All names of a parameter, the one its optimizer state is saved under first."""
        return next((tuple(dict.fromkeys(group)) for group in self.aliases if name in group), (name,))

    def optimized(self, optimizer: Optimizer | None) -> list[tuple[Tensor, dict[str, Any], tuple[str, ...]]]:
        """Every parameter of an optimizer, with its group and all its names."""
        names = {id(p): n for module in self.modules for n, p in module.named_parameters()}
        groups = optimizer.param_groups if optimizer is not None else []
        parameters = [(parameter, group) for group in groups for parameter in group["params"]]
        if any(id(parameter) not in names for parameter, _ in parameters):
            raise PipelineError("the optimizer has a parameter that is not this rank's: give it pipeline.parameters().")
        return [(p, group, self.names_of(names[id(p)])) for p, group in parameters]


def merged_state(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of several stages under their original names."""
    return {name: value for module in modules for name, value in module.state_dict().items()}


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    step: int | None = None,
    others: Mapping[str, Stateful] | None = None,
) -> None:
    """Write a checkpoint of an unsplit model, which pipelines of any width can load.

    Args:
        path: A folder.
        model: The model.
        optimizer: Whose state is written too.
        step: Of the run, for `load_checkpoint` to return.
        others: Objects with a `state_dict` of plain data, by name: a scheduler, a gradient scaler.

    Raises:
        PipelineError: The optimizer has parameters that are not the model's, or an object has no state.
        SaveError: The folder cannot be written; what it held before is as it was.
    """
    write_state(path, state_of(whole(model), optimizer) | run_state(step, others))


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    others: Mapping[str, Stateful] | None = None,
    random: bool = False,
) -> Loaded:
    """Read a checkpoint into an unsplit model, in place, whether it was saved from a pipeline or from a model.

    Args:
        path: The folder.
        model: The model, which gets the values.
        optimizer: Whose state is read too.
        others: Objects whose state is read too, by the names that they were saved under.
        random: Whether to set torch's random states (CPU and current accelerator) to what they were at the save.

    Returns:
        The step, and whether the random states were set.

    Raises:
        PipelineError: The folder holds no complete checkpoint, or that of another model.
        ConfigError: It is of a model with another config; the model is as it was.
        SaveError: The checkpoint is damaged; the model is as it was.
    """
    return load_modules(path, whole(model), optimizer, others=others, random=random)


def whole(model: nn.Module) -> Parts:
    """An unsplit model as the only part of itself."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    made_for = {f"{n}._extra_state": m.made_for for n, m in model.named_modules() if isinstance(m, AttnResParameters)}
    return Parts((model,), tuple(tuple(group) for group in names.values() if len(group) > 1), made_for)


def state_of(parts: Parts, optimizer: Optimizer | None) -> dict[str, Any]:
    """What a rank writes of its modules and their optimizer, by the keys of the checkpoint.

    Raises:
        PipelineError: The optimizer has parameters that are not this rank's.
    """
    made_for = {name: made_for.to_tensor() for name, made_for in parts.made_for.items()}
    values = merged_state(parts.modules) | made_for
    state: dict[str, Any] = {f"model.{name}": value for name, value in values.items()}
    for parameter, group, names in parts.optimized(optimizer):
        entries = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        state |= {_STATE.format(names[0]) + key: value for key, value in entries.items()}
        state |= {_OPTIONS.format(names[0]) + key: value for key, value in group.items() if key != "params"}
    return state


def write_state(path: str | Path, state: dict[str, Any], *, group: dist.ProcessGroup | None = None) -> None:
    """Write what every rank has; all ranks call it. The checkpoint that was there stays until all of it is written.

    Args:
        path: The folder.
        state: Of this rank, by the keys of the checkpoint.
        group: Of the ranks; the default group where None.

    Raises:
        SaveError: A rank could not write its part.
    """
    with in_words(path, "could not be written; what the folder held before is as it was"), _one_process_is_meant():
        save(state, storage_writer=FolderWriter(path), no_dist=not dist.is_initialized(), process_group=group)


def load_modules(
    path: str | Path,
    parts: Parts,
    optimizer: Optimizer | None,
    *,
    others: Mapping[str, Stateful] | None = None,
    random: bool = False,
) -> Loaded:
    """Read the parts of every rank, in place; all ranks call it. See `load_checkpoint`.

    A tied parameter is read under whichever of its names the checkpoint has.

    Raises:
        PipelineError: A name is missing, or the folder holds no complete checkpoint.
        ConfigError: It is of a model with another config; nothing was changed.
        SaveError: The checkpoint is damaged; nothing was changed.
    """
    written = _read_names(path)
    _require_config(path, parts.made_for, written)
    values = {n: v for n, v in merged_state(parts.modules).items() if n not in parts.made_for}
    # What modules keep beside tensors of their own: stages have none.
    values = {n: v for n, v in values.items() if not n.endswith("_extra_state") or f"model.{n}" in written}
    keys = {name: _first(written, "model.{}", (name, *parts.names_of(name))) for name in values}
    missing = sorted(name for name, key in keys.items() if key not in written)
    if missing:
        raise PipelineError(
            f"the checkpoint {str(path)!r} has no {missing[0]!r} ({len(missing)} names are missing): it is of another "
            f"model, or of one converted with another config."
        )
    state: dict[str, Any] = {}
    for name, key in keys.items():
        state.setdefault(key, values[name])  # one of the names of a tied parameter
    optimized = parts.optimized(optimizer)
    prefixes = [_first(written, _OPTIONS, names) for _, _, names in optimized]
    for (parameter, _, _), prefix in zip(optimized, prefixes, strict=True):
        state |= room_for(parameter, (prefix, prefix.replace("param_groups", "state", 1)), written)
    state |= room_for_run(written, others, random=random)
    _read_into(state, path)
    _give_tied(values, keys, state)
    for part in (part for module in parts.modules for part in module.modules()):
        if isinstance(part, AttnResParameters):
            part.set_extra_state(part.made_for.to_tensor())  # whatever was written into its place before
    if optimizer is not None:
        restore_optimizer(optimizer, prefixes, state)
    return restore_run(state, others, random=random)


@torch.no_grad()
def _give_tied(values: Mapping[str, Any], keys: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Write what was read for another name of the same parameter."""
    for name, key in keys.items():
        if state[key] is not values[name]:
            values[name].copy_(state[key])


def _read_names(path: str | Path) -> dict[str, Any]:
    with in_words(path, "is damaged, or was not written by save()"):
        try:
            return dict(FolderReader(path).read_metadata().state_dict_metadata)
        except FileNotFoundError as error:
            raise PipelineError(
                f"there is no whole checkpoint at {str(path)!r} ({error}): give the folder that save() wrote. A folder "
                f"without a .metadata file is one whose first save was cut short, and cannot be used."
            ) from error


def _require_config(path: str | Path, made_for: Mapping[str, MadeFor], written: Mapping[str, Any]) -> None:
    """Raise ConfigError where a checkpoint is of a model that computes another function of the same parameters."""
    for name, own in made_for.items():
        what = written.get(f"model.{name}")
        if not isinstance(what, TensorStorageMetadata):
            warnings.warn(
                f"the checkpoint {str(path)!r} does not say which config it was made with. If it was another than "
                f"{shown_config(own.config)}, the model computes another function now: save it anew where it is known.",
                stacklevel=4,
            )
            continue
        state = {f"model.{name}": torch.zeros(what.size, dtype=what.properties.dtype)}
        _read_into(state, path, alone=True)
        found = MadeFor.from_tensor(state[f"model.{name}"])
        different = found.differences(own)
        if different and not found.means_the_same(own):
            raise ConfigError(
                f"the checkpoint {str(path)!r} was made with {shown_config(found.config)}, and this model with "
                f"{shown_config(own.config)}: the same parameters would compute another function "
                f"({', '.join(different)}). Plan or convert the original with the config of the checkpoint, and load "
                f"it then. Nothing was changed."
            )


def _read_into(state: dict[str, Any], path: str | Path, *, alone: bool = False) -> None:
    """Read what a state names, in place: on all ranks together, or each for itself."""
    with in_words(path, "is damaged, or was not written by save()"), _one_process_is_meant():
        reader, planner = FolderReader(path), PlainLoadPlanner()
        load(state, storage_reader=reader, planner=planner, no_dist=alone or not dist.is_initialized())


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without torch's warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _first(written: dict[str, Any], pattern: str, names: Sequence[str]) -> str:
    """The key, or the beginning of keys, of the first name that the checkpoint knows."""
    keys = [pattern.format(name) for name in names]
    return next((key for key in keys if key in written or key + "lr" in written), keys[0])
