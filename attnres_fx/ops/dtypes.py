"""The dtypes of a read: of its result, and of its arithmetic."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def result_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """The dtype `+` over all sources would have."""
    return reduce(torch.promote_types, (s.dtype for s in sources))


def compute_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the arithmetic: float64 where a source is, else float32."""
    return torch.float64 if result_dtype(sources) == torch.float64 else torch.float32
