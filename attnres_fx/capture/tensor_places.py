"""Where the tensors of a module tree are: each one's path, by identity."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_DEEPEST = 4


def tensor_places(root: nn.Module) -> dict[int, str]:
    """The attribute path of every tensor that can be reached from the modules of a tree.

    Args:
        root: The tree. Parameters and buffers come first, so a tensor that is also in a list has their name.

    Returns:
        By the id of the tensor: a dotted path; what a container holds has its key as a part of the path.
    """
    places: dict[int, str] = {}
    modules = list(root.named_modules(remove_duplicate=False))
    for prefix, module in modules:
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    places.setdefault(id(tensor), f"{prefix}.{name}" if prefix else name)
    for prefix, module in modules:
        for name, value in module.__dict__.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for path, tensor in tensors_within(value):
                    places.setdefault(id(tensor), ".".join(p for p in (prefix, name, path) if p))
    return places


def tensors_within(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a value is or holds in containers and plain objects, with the path to each."""
    if isinstance(value, Tensor):
        yield path, value
    elif depth >= _DEEPEST or isinstance(value, nn.Module | type):
        return
    elif isinstance(value, list | tuple):
        for i, held in enumerate(value):
            yield from tensors_within(held, f"{path}.{i}" if path else str(i), depth + 1)
    elif isinstance(value, dict):
        for key, held in value.items():
            yield from tensors_within(held, f"{path}.{key}" if path else str(key), depth + 1)
    elif hasattr(value, "__dict__") and not callable(value):
        for key, held in vars(value).items():
            yield from tensors_within(held, f"{path}.{key}" if path else key, depth + 1)
