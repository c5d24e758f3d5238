"""The dtypes of a read: of its result, and of its arithmetic."""

import contextlib
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def result_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """The dtype `+` over all sources would have."""
    return reduce(torch.promote_types, (s.dtype for s in sources))


def compute_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the arithmetic: float64 where a source is, else float32."""
    return torch.float64 if result_dtype(sources) == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A region where autocast does not cast what runs on a device."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
