"""A save that goes on while the run does: values are copied, and another thread writes them."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from attnres_fx.partition.checkpoint import write_state
from attnres_fx.partition.checkpoint_folder import FolderWriter


class PendingSave:
    """A save that another thread is writing.

    The thread talks to the other ranks over a group of its own, so that the run's own messages are not held up.

    Args:
        path: The folder.
        state: Of this rank, by the keys of the checkpoint; copied before the constructor returns.
        group: Of the ranks, for nothing else, with a backend for tensors on the CPU; None for one process.
    """

    def __init__(self, path: str | Path, state: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
        self.path = path
        copied = FolderWriter(path).stage(dict(state))  # memory of its own, on the CPU
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attnres_fx save")
        self._written: Future[None] = self._thread.submit(write_state, path, copied, group=group)
        self._thread.shutdown(wait=False)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._written.done()

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            SaveError: A rank could not write its part; the checkpoint that was there is as it was.
        """
        self._written.result()
