"""Running and copying a caller's model without leaving a trace on it."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Mode = Literal["train", "eval"]


def shared_copy(module: Any) -> Any:
    """A copy of a module tree that holds the same parameter and buffer objects."""
    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def mirror(model: nn.Module) -> nn.Module:
    """Empty modules in the shape of a model's tree, holding the model's own parameters and buffers."""
    made: dict[int, nn.Module] = {}

    def build(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        empty = made[id(module)] = nn.Module()
        for name, parameter in module._parameters.items():
            empty.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            empty.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            empty.add_module(name, build(child) if child is not None else None)
        return empty

    return build(model)


@contextlib.contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The model in train or eval mode; every module's own flag is put back after."""
    flags = {m: m.training for m in model.modules()}
    try:
        if model.training != (mode == "train"):
            with contextlib.suppress(NotImplementedError):  # an exported graph holds one mode and refuses to change
                model.train(mode == "train")
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def run_untouched(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], mode: Mode, *, seed: int = 0
) -> Any:
    """Outputs of one run that leaves buffers, arguments and random state as they were, without gradients."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (tuple(args), dict(kwargs)))
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index for d in devices]), torch.no_grad(), in_mode(model, mode):
        torch.manual_seed(seed)
        with fast_path_off():
            return torch.func.functional_call(model, buffers, args, dict(kwargs))


@contextlib.contextmanager
def fast_path_off() -> Iterator[None]:
    """nn.TransformerEncoder without its fused inference path, which has no additions to find."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def checkpoint_watch() -> Iterator[list[bool]]:
    """Notes whether the model calls `torch.utils.checkpoint`."""
    import torch.utils.checkpoint as module

    seen: list[bool] = []
    names = ("_checkpoint_without_reentrant_generator", "_infer_device_type")
    originals: dict[str, Callable[..., Any]] = {n: getattr(module, n) for n in names if hasattr(module, n)}

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(True)
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(module, name, watched(original))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
