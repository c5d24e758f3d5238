"""Who looks at a call of an operator, and so which of its forms may run: kernels, eager, compiler or definition."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_PLAIN = (Tensor, torch.nn.Parameter)
_TRACING_MODES = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)


def is_traced() -> bool:
    """Whether this thread is tracing. `torch.compiler.is_compiling` also says so while another thread does."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and (
        TracingContext.try_get() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )


def is_transformed(sources: Sequence[Tensor]) -> bool:
    """Whether a transform of `torch.func`, forward mode or another library's tensors must see the definition."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(not isinstance(s, FakeTensor | FunctionalTensor) and type(s) not in _PLAIN for s in sources)
    )


def runs_in_plain_eager(sources: Sequence[Tensor]) -> bool:
    """Whether no tracer and no transform is looking, so that saving only row statistics is ours to do.

    Modes that merely watch (FLOP counters, selective checkpointing) are neither.
    """
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_traced()
        or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)
        or any(type(s) is not Tensor and type(s) is not torch.nn.Parameter for s in sources)
    )


def runs_under_a_compiler(sources: Sequence[Tensor]) -> bool:
    """Whether AOTAutograd traces this, for the CPU and under no transform, so that backward may be ours too."""
    return (
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and all(type(s) is FunctionalTensor and s.device.type == "cpu" for s in sources)
    )


def has_no_data(tensors: Sequence[Tensor]) -> bool:
    """Whether a read of these has shapes alone to compute, and nothing records or transforms how it gets them."""
    return (
        all(isinstance(t, FakeTensor) for t in tensors)
        and all(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
