"""What graphs take for granted of the tensors that a module tree holds: which of them are one, and which are none.

A graph knows a tied tensor once, and takes it from one of its places. What was None is not in it at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

#: The path of a module, and the name of a parameter or buffer of it.
Place = tuple[str, str]


@dataclass(frozen=True)
class TensorsAsCaptured:
    """The tensors of a tree as they were when its programs were captured.

    Attributes:
        tied: Groups of places that held one tensor.
        absent: Places that held none, each with its module.
    """

    tied: tuple[tuple[Place, ...], ...] = ()
    absent: tuple[tuple[Place, nn.Module], ...] = ()

    @classmethod
    def of(cls, root: nn.Module, skipped: Sequence[str]) -> Self:
        """The tensors of a tree as they are now.

        Args:
            root: The tree. A module that is called from several places is one.
            skipped: Names of the root's children that are left out.
        """
        places: dict[int, list[Place]] = {}
        absent: list[tuple[Place, nn.Module]] = []
        for path, module in root.named_modules():
            if path.partition(".")[0] in skipped:
                continue
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    absent.append(((path, name), module))
                else:
                    places.setdefault(id(tensor), []).append((path, name))
        return cls(tuple(tuple(found) for found in places.values() if len(found) > 1), tuple(absent))

    def first_change(self, root: nn.Module) -> str:
        """What is no longer so, in words; empty where everything is."""
        for (path, name), module in self.absent:
            if _held(module, name) is not None:
                return f"{_words((path, name))} is a tensor now and was None"
        for first, *others in self.tied:
            tensor = _at(root, first)
            for other in others:
                if _at(root, other) is not tensor:
                    return f"{_words(first)} and {_words(other)} are two tensors now and were one"
        return ""


def _at(root: nn.Module, place: Place) -> Any:
    try:
        return _held(root.get_submodule(place[0]), place[1])
    except AttributeError:
        return None


def _held(module: nn.Module, name: str) -> Any:
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def _words(place: Place) -> str:
    return ".".join(part for part in place if part)
