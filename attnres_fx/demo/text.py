"""Real text at hand on every machine: the sources of Python's standard library, as bytes."""

import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Folders that are not part of the language's own library, or are tests of it.
SKIPPED = frozenset({"site-packages", "test", "tests", "idlelib", "__pycache__"})


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and fixed batches to validate with.

    Args:
        train: [length], uint8.
        validation: Pairs of ids and the same one byte later, [batch, context] each, int64.
        batch: Windows of a batch.
        context: Bytes of a window.
    """

    train: Tensor
    validation: tuple[tuple[Tensor, Tensor], ...]
    batch: int
    context: int

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows of the training text and the same one byte later, [batch, context] each.

        Args:
            generator: What chooses where they begin; equal generators draw equal batches.

        Returns:
            ids and targets, int64.
        """
        return _windows(self.train, self.batch, self.context, generator)


def standard_library(batch: int, context: int, validation_batches: int = 32) -> Text:
    """The sources of the running Python's standard library; every tenth file is kept for validation.

    Args:
        batch: Windows of a batch.
        context: Bytes of a window.
        validation_batches: How many batches to validate with; they are the same in every process.

    Returns:
        At most 8 MiB to train on, and the validation batches, drawn from at most 1 MiB.
    """
    train, held = _sources()
    generator = torch.Generator().manual_seed(0)
    validation = tuple(_windows(held, batch, context, generator) for _ in range(validation_batches))
    return Text(train, validation, batch, context)


@functools.cache
def _sources() -> tuple[Tensor, Tensor]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(folder.rglob("*.py")) if not SKIPPED & set(p.relative_to(folder).parts)]
    train = b"".join(p.read_bytes() for i, p in enumerate(files) if i % 10)[: 8 << 20]
    held = b"".join(p.read_bytes() for i, p in enumerate(files) if i % 10 == 0)[: 1 << 20]
    return torch.frombuffer(bytearray(train), dtype=torch.uint8), torch.frombuffer(bytearray(held), dtype=torch.uint8)


def _windows(source: Tensor, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(0, len(source) - context - 1, (batch,), generator=generator)
    windows = torch.stack([source[s : s + context + 1] for s in starts.tolist()]).long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
