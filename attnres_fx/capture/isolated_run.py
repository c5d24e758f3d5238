"""Running a caller's model without leaving a trace on it: on a clone of its tree, with buffers of its own."""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.capture.followed import Followed
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.capture.reachable_objects import left_as_it_was

Mode = Literal["train", "eval"]


def shared_copy(module: Any) -> Any:
    """A deep copy of a module tree that holds the same parameter and buffer objects."""
    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def set_mode_(model: nn.Module, mode: Mode) -> None:
    """Put a model in a mode as its `train` does; one that is in it keeps the flags of its submodules."""
    if model.training != (mode == "train"):
        with contextlib.suppress(NotImplementedError):  # an exported graph holds one mode and refuses to change
            model.train(mode == "train")


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Tensors made inside can be trained later, whatever mode the caller is in; gradients stay on or off."""
    on = torch.is_grad_enabled()
    with torch.inference_mode(mode=False), torch.set_grad_enabled(on):
        yield


@contextlib.contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The model in train or eval mode; every module's own flag is put back after."""
    flags = {m: m.training for m in model.modules()}
    try:
        set_mode_(model, mode)
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def isolated_clone(model: nn.Module, written: Collection[str] = ()) -> nn.Module:
    """A clone of a model with parameters of its own on the same memory; buffers and other tensors are copies.

    Args:
        model: Left as it is.
        written: Parameters that a call writes into, by name: copies too.
    """
    clone, _ = clone_tree(model)
    copies: dict[int, Tensor] = {}
    kept: list[Tensor] = []

    def own(tensor: Tensor, path: str = "") -> Tensor:
        if id(tensor) not in copies:
            kept.append(tensor)
            if isinstance(tensor, nn.Parameter):
                data = tensor.detach().clone() if path in written else tensor.detach()
                copies[id(tensor)] = nn.Parameter(data, tensor.requires_grad)
            else:
                copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    modules = dict(clone.named_modules())
    for path, module in modules.items():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = own(tensor, f"{path}.{name}".lstrip("."))  # type: ignore[index]
    for module in modules.values():
        for name, value in module.__dict__.items():
            if name not in _STORES and not name.endswith("hooks"):
                module.__dict__[name] = _with_copies(value, own)
    follow = Followed(copies)
    for module in modules.values():
        for name, value in module.__dict__.items():
            if name not in _STORES:
                module.__dict__[name] = follow(value)
    return clone


_STORES = ("_parameters", "_buffers", "_modules")


def _with_copies(value: Any, copied: Callable[[Tensor], Tensor]) -> Any:
    """A value with copies of the tensors that it is or holds in containers; those of a clone are its own."""
    if isinstance(value, Tensor):
        return copied(value)
    if type(value) is list or type(value) is tuple:
        return type(value)(_with_copies(v, copied) for v in value)
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        for key, held in value.items():
            value[key] = _with_copies(held, copied)
    return value


@contextlib.contextmanager
def seeded(devices: Sequence[torch.device], seed: int = 0) -> Iterator[None]:
    """From one random state, which is put back after, on the CPU and on these devices."""
    cuda = {d.index for d in devices if d.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in cuda if d is not None)):
        torch.manual_seed(seed)
        yield


def run_untouched(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], mode: Mode, *, seed: int = 0
) -> Any:
    """Outputs of one run that leaves buffers, arguments and random state as they were, without gradients."""
    clone = isolated_clone(model)
    set_mode_(clone, mode)
    args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (tuple(args), dict(kwargs)))
    devices = list({t.device for t in clone.parameters()})
    with seeded(devices, seed), torch.no_grad(), fast_path_off(), left_as_it_was(clone, args, kwargs):
        return clone(*args, **kwargs)


@contextlib.contextmanager
def fast_path_off() -> Iterator[None]:
    """nn.TransformerEncoder without its fused inference path, which has no additions to find."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
