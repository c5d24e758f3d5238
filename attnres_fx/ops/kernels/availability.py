"""Whether the Triton kernels can run here, and if not, why."""

import functools
import os

import torch
from torch import Tensor

#: Triton runs kernels in Python, on CPU tensors, where this is set.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")

_OLDEST = (3, 4)


@functools.cache
def why_not() -> str | None:
    """Why no kernel can run in this process, or None."""
    try:
        import triton  # type: ignore[import-untyped]
    except ImportError:
        return "Triton is not installed"
    version = tuple(int(p) for p in triton.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST))}"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "there is no CUDA device"


def kernel_device(source: Tensor) -> bool:
    return source.device.type == ("cpu" if INTERPRETED else "cuda")
