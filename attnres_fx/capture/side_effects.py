"""What a traced call left behind on its module tree: tensors to write again at every call, and what cannot be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TREE = ("_modules",)
_STORES = ("_parameters", "_buffers")
#: Kept by nn.Module itself, or by Dynamo on what it compiled.
_NOT_STATE = ("training", "_compiled_call_impl", "_is_full_backward_hook")


@dataclass(frozen=True)
class TensorWrite:
    """A tensor that every call stores in an attribute.

    Attributes:
        module: Path of the module that holds it.
        name: The attribute.
        buffer: Whether it is a registered buffer.
        output: Which output of the graph is stored.
    """

    module: str
    name: str
    buffer: bool
    output: int

    @property
    def place(self) -> str:
        """The attribute's path in the model."""
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class PythonChange:
    """Something of a module that a call changed and that is no tensor of the graph.

    Attributes:
        module: Path of the module that holds it.
        name: The attribute.
        before: What it was, in words.
        after: What it became, in words.
    """

    module: str
    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}: {self.before} -> {self.after}".removeprefix(".")


Attributes = dict[tuple[str, str, str], Any]


def attributes_of(root: nn.Module) -> Attributes:
    """What every module of a tree holds, with copies of its containers, by (module, store, name)."""
    held: Attributes = {}
    for path, module in root.named_modules():
        for store in ("", *_STORES):
            values: Mapping[str, Any] = module.__dict__[store] if store else module.__dict__
            for name, value in values.items():
                if store or name not in (*_TREE, *_STORES, *_NOT_STATE):
                    held[path, store, name] = value, _contents(value)
    return held


def changes_since(
    before: Attributes, root: nn.Module, outputs: Sequence[Any]
) -> tuple[list[TensorWrite], list[PythonChange]]:
    """What changed in a tree.

    Args:
        before: What `attributes_of` said before the call.
        root: The tree after it.
        outputs: What the graph returned.

    Returns:
        The attributes that now hold an output, and everything else that is not what it was.
    """
    position = {id(o): i for i, o in enumerate(outputs) if isinstance(o, Tensor)}
    writes: list[TensorWrite] = []
    changes: list[PythonChange] = []
    missing = object()
    now = attributes_of(root)
    for key, (value, contents) in now.items():
        old, old_contents = before.get(key, (missing, None))
        if value is old and contents == old_contents:
            continue
        path, store, name = key
        if isinstance(value, Tensor) and id(value) in position:
            writes.append(TensorWrite(path, name, store == "_buffers", position[id(value)]))
        elif value is not old and _equal(value, old):
            continue
        else:
            changes.append(_change(key, "missing" if old is missing else _shown(old_contents, old), value))
    changes += [_change(key, _shown(c, v), "missing") for key, (v, c) in before.items() if key not in now]
    return writes, changes


def replace_stand_ins_(root: nn.Module, writes: Sequence[TensorWrite], changes: Sequence[PythonChange]) -> None:
    """Replace, in place, what a recorded call left on a tree by what a call leaves, as far as another trace can see.

    Stand-ins become zeros of their shape, and symbolic sizes become numbers.
    """
    device = next((t.device for t in root.parameters()), torch.device("cpu"))
    for write in writes:
        module = root.get_submodule(write.module)
        value = getattr(module, write.name)
        setattr(module, write.name, torch.zeros(value.shape, dtype=value.dtype, device=device))
    for change in changes:
        held = root.get_submodule(change.module).__dict__
        if isinstance(held.get(change.name), int) and not isinstance(held[change.name], bool):
            held[change.name] = int(held[change.name])


def _change(key: tuple[str, str, str], before: str, value: Any) -> PythonChange:
    path, _, name = key
    after = value if value == "missing" else _shown(_contents(value), value)
    return PythonChange(path, name, before, after)


def _contents(value: Any) -> Any:
    """What a container holds, by identity where it holds tensors; None for what is no container."""
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_mark(v) for v in value)
    if isinstance(value, dict):
        return tuple((_mark(k), _mark(v)) for k, v in value.items())
    return None


def _mark(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else id(value)


def _equal(value: Any, old: Any) -> bool:
    plain = str | int | float | bool | complex | bytes | None
    return isinstance(value, plain) and type(value) is type(old) and bool(value == old)


def _shown(contents: Any, value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if contents is not None:
        return f"a {type(value).__name__} of {len(contents)}"
    return repr(value)[:60]
