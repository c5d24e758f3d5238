"""Checkpoints of a pipeline: this rank's part of a save or a load."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from attnres_fx.partition import checkpoint
from attnres_fx.partition.pending_save import PendingSave
from attnres_fx.partition.run_state import Loaded, Stateful, run_state


class Checkpointed(ABC):
    """What has parts on several ranks that are saved and loaded together. Every rank calls every method."""

    def __init__(self) -> None:
        self._pending: PendingSave | None = None
        self._save_group: dist.ProcessGroup | None = None

    @abstractmethod
    def _checkpoint_parts(self) -> checkpoint.Parts:
        """This rank's."""

    def save(
        self,
        path: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        step: int | None = None,
        others: Mapping[str, Stateful] | None = None,
    ) -> None:
        """Write a checkpoint that any number of stages, or the unsplit model (`load_checkpoint`), can load.

        The folder is replaced as a whole: a rank that is killed leaves the checkpoint that was there, or the new one.

        Args:
            path: A folder, the same on every rank.
            optimizer: This rank's, whose state is written too.
            step: Of the run, for `load` to return.
            others: Objects with a `state_dict` of plain data, by name, in the same state on every rank: a scheduler,
                a gradient scaler.

        Raises:
            PipelineError: The optimizer has parameters that are not this rank's, or an object has no state.
            SaveError: A rank could not write its part; the checkpoint that was there is as it was. So after a save in
                the background that failed.
        """
        self._finish_save()
        checkpoint.write_state(path, self._state(optimizer, step, others))

    def async_save(
        self,
        path: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        step: int | None = None,
        others: Mapping[str, Stateful] | None = None,
    ) -> PendingSave:
        """Begin what `save` does, and return when everything is copied to the CPU; another thread writes it.

        Args:
            path: As for `save`.
            optimizer: As for `save`.
            step: As for `save`.
            others: As for `save`.

        Returns:
            The save, to wait for. The next save or load waits for it as well.

        Raises:
            PipelineError: As for `save`.
            SaveError: The save before it failed.
        """
        self._finish_save()
        state = self._state(optimizer, step, others)
        if self._save_group is None and dist.is_initialized():
            self._save_group = dist.new_group(backend="gloo")
        self._pending = PendingSave(path, state, self._save_group)
        return self._pending

    def load(
        self,
        path: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        others: Mapping[str, Stateful] | None = None,
        random: bool = False,
    ) -> Loaded:
        """Read a checkpoint in place, whether it was saved with any number of stages or from the unsplit model.

        Args:
            path: The folder.
            optimizer: This rank's, whose state is read too.
            others: Objects whose state is read too, by the names that they were saved under.
            random: Whether to set torch's random states (CPU and current accelerator) to what this rank had at the
                save. Of a save by another number of processes they are left as they are, with a warning.

        Returns:
            The step, and whether the random states were set.

        Raises:
            PipelineError: The folder holds no complete checkpoint, or that of another model.
            ConfigError: It is of a model with another config; the pipeline is as it was.
            SaveError: The checkpoint is damaged; the pipeline is as it was.
        """
        self._finish_save()
        return checkpoint.load_modules(path, self._checkpoint_parts(), optimizer, others=others, random=random)

    def _finish_save(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def _state(
        self, optimizer: torch.optim.Optimizer | None, step: int | None, others: Mapping[str, Stateful] | None
    ) -> dict[str, Any]:
        return checkpoint.state_of(self._checkpoint_parts(), optimizer) | run_state(step, others)
