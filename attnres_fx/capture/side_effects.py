"""What a traced call left behind on its module tree: tensors to write again at every call, and what cannot be."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TREE = ("_modules",)
_STORES = ("_parameters", "_buffers")
#: Kept by nn.Module itself, or by Dynamo on what it compiled.
_FILLED = ", with tensors of this call"
_NOT_STATE = ("training", "_compiled_call_impl", "_is_full_backward_hook")


@dataclass(frozen=True)
class TensorWrite:
    """A tensor that every call stores in an attribute.

    Attributes:
        module: Path of the module that holds it.
        name: The attribute.
        buffer: Whether it is a registered buffer.
        output: Which output of the graph is stored.
        first: Whether the attribute held no tensor of this shape before the recorded call, which may have set it once.
        persistent: Whether it is part of the model's state, of a buffer.
    """

    module: str
    name: str
    buffer: bool
    output: int
    first: bool = False
    persistent: bool = True

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
        outside: Whether it is outside the modules; then `name` says what it is, in words.
        logged: Whether it is no more than plain values at the end of a list that a Python module has.
        table: Whether it is a buffer that a call fills with a table of the sizes of its arguments.
    """

    module: str
    name: str
    before: str
    after: str
    outside: bool = False
    logged: bool = False
    table: bool = False

    @property
    def place(self) -> str:
        """Where it is, in the model or in words."""
        return f"{self.module}.{self.name}" if self.module else self.name

    def __str__(self) -> str:
        return f"{self.place}: {self.before} -> {self.after}"


Attributes = dict[tuple[str, str, str], Any]


def attributes_of(root: nn.Module) -> Attributes:
    """What every module of a tree holds, with copies of its containers, by (module, store, name)."""
    held: Attributes = {}
    for path, module in root.named_modules():
        for store in ("", *_STORES):
            values: Mapping[str, Any] = module.__dict__[store] if store else module.__dict__
            for name, value in values.items():
                if store or name not in (*_TREE, *_STORES, *_NOT_STATE):
                    held[path, store, name] = value, contents_of(value)
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
            first = not isinstance(old, Tensor) or old.shape != value.shape
            persistent = name not in root.get_submodule(path)._non_persistent_buffers_set
            writes.append(TensorWrite(path, name, store == "_buffers", position[id(value)], first, persistent))
        elif value is not old and _equal(value, old):
            continue
        else:
            changes.append(_change(key, "missing" if old is missing else shown_as(old_contents, old), value))
    changes += [_change(key, shown_as(c, v), "missing") for key, (v, c) in before.items() if key not in now]
    return writes, changes


def replace_stand_ins_(
    root: nn.Module, writes: Sequence[TensorWrite], changes: Sequence[PythonChange], device: torch.device
) -> None:
    """Replace, in place, what a recorded call left on a tree by what a call leaves, as far as another trace can see.

    Stand-ins become zeros of their shape, and symbolic sizes become numbers.
    """
    for write in writes:
        module = root.get_submodule(write.module)
        value = getattr(module, write.name)
        setattr(module, write.name, torch.zeros(value.shape, dtype=value.dtype, device=device))
    for change in changes:
        held = root.get_submodule(change.module).__dict__
        if not change.outside and change.name in held:
            held[change.name] = settled(held[change.name], device)


def settled(value: Any, device: torch.device) -> Any:
    """A value with zeros in the place of tensors without data, also in lists and dicts, and numbers for sizes."""
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=value.dtype, device=device) if value.is_meta else value
    if isinstance(value, list | deque):
        for i, held in enumerate(value):
            value[i] = settled(held, device)
    elif isinstance(value, dict):
        for key, held in value.items():
            value[key] = settled(held, device)
    elif isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return value


def _change(key: tuple[str, str, str], before: str, value: Any) -> PythonChange:
    path, _, name = key
    after = value if value == "missing" else shown_as(contents_of(value), value)
    return PythonChange(path, name, before, after)


def contents_of(value: Any) -> Any:
    """What a container holds, by identity where it holds tensors; None for what is no container."""
    if isinstance(value, list | tuple | set | frozenset | deque):
        return tuple(mark_of(v) for v in value)
    if isinstance(value, dict):
        return tuple((mark_of(k), mark_of(v)) for k, v in value.items())
    return None


class _Same:
    """An object, equal to itself alone; it is kept alive, or another might get its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def mark_of(value: Any) -> Any:
    """A plain value as it is; what stands for the object itself of any other."""
    return value if isinstance(value, str | int | float | bool | None) else _Same(value)


def _equal(value: Any, old: Any) -> bool:
    plain = str | int | float | bool | complex | bytes | None
    return isinstance(value, plain) and type(value) is type(old) and bool(value == old)


def shown_as(contents: Any, value: Any) -> str:
    """A value in a few words, with the contents that it had."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if contents is not None:
        held = value.values() if isinstance(value, dict) else value
        filled = _FILLED if any(isinstance(v, Tensor) and v.is_meta for v in held) else ""
        return f"a {type(value).__name__} of {len(contents)}{filled}"
    return repr(value)[:60]


def python_state_message(name: str, changes: Sequence[PythonChange], by_dynamo: bool = True) -> str:
    """The refusal of a model that leaves something behind in Python; where Dynamo takes it, compiled it may."""
    listed = "; ".join(map(str, changes[:2])) + (f" and {len(changes) - 2} more" if len(changes) > 2 else "")
    filled = [c.place for c in changes if c.after.endswith(_FILLED)]
    way_out = (
        f"Return what {filled[0]} holds from forward, or store each tensor in an attribute of a module (module.loss = "
        f"loss)"
        if filled and not any(c.outside for c in changes)
        else "Return it from forward, store it in an attribute of a module (module.h = h), take the hook off"
        if any(c.outside for c in changes)
        else "Keep it in a buffer (register_buffer, and write to the tensor), leave it out of forward"
    )
    or_compile = ", or use ax.compile, which runs the model's own Python" if by_dynamo else ""
    return f"a call of {name} changes Python state, which a graph cannot hold: {listed}. {way_out}{or_compile}."
