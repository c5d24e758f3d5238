"""Tensors that a module tree holds in several places: a graph knows one tensor, and takes it from one of them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

#: Paths of modules with the name of a parameter or buffer, which held one tensor.
TiedPlaces = tuple[tuple[str, str], ...]


def tied_places(root: nn.Module, skipped: Sequence[str]) -> tuple[TiedPlaces, ...]:
    """The places of every parameter and buffer that is in more than one module.

    Args:
        root: The tree. A module that is called from several places is one.
        skipped: Names of the root's children that are left out.
    """
    places: dict[int, list[tuple[str, str]]] = {}
    for path, module in root.named_modules():
        if path.partition(".")[0] not in skipped:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((path, name))
    return tuple(tuple(found) for found in places.values() if len(found) > 1)


def first_untied(root: nn.Module, tied: Sequence[TiedPlaces]) -> str:
    """Two places that held one tensor and do not any more, in words; empty where there are none."""
    for first, *others in tied:
        tensor = _at(root, first)
        for other in others:
            if _at(root, other) is not tensor:
                return " and ".join(".".join(part for part in place if part) for place in (first, other))
    return ""


def _at(root: nn.Module, place: tuple[str, str]) -> Any:
    path, name = place
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return None
    return module._parameters.get(name, module._buffers.get(name))
