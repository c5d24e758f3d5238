"""What a graph takes for granted of a call besides sizes: constants, aliases, gradients, strides and globals."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnres_fx.capture.held_values import same, value_at
from attnres_fx.capture.taken_tensors import TakenTensors, first_other_tensor
from attnres_fx.errors import ArgumentError
from attnres_fx.ops.dispatch import is_traced

Strides = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class GlobalValue:
    """A plain value that a graph holds and that a Python module has.

    Attributes:
        module: The Python module's name.
        steps: Attributes and keys that lead to it from there.
        value: What it was.
    """

    module: str
    steps: tuple[Any, ...]
    value: Any


@dataclass(frozen=True)
class HeldValue:
    """A plain value that a graph holds and that a class, a function's closure or an argument has.

    Attributes:
        holder: The class, the closure's cell, or another object.
        steps: Attributes and keys that lead to it from there.
        value: What it was.
        place: What it is, in words.
    """

    holder: Any
    steps: tuple[Any, ...]
    value: Any
    place: str

    def changed(self) -> str:
        """What it is now and was, in words; empty where it is the same."""
        now = value_at(self.holder, self.steps)
        if same(now, self.value):
            return ""
        short = not isinstance(self.value, tuple)
        return f"{self.place} is {now!r} and was {self.value!r}" if short else f"{self.place} is another than it was"


@dataclass(frozen=True)
class Assumed:
    """What holds of the calls that a graph is right for.

    Attributes:
        constants: The flat arguments that are no tensors, by their places.
        same: For each flat argument the first place that holds the same tensor; empty where it is not known.
        gradients: Whether gradients were on (None where the graph is the same either way), then whether each flat
            argument needs one; None where nothing asked.
        trained: Whether each parameter needs a gradient, by name; None where nothing asked.
        strides: Of each flat argument, None where it is contiguous, empty where only that was asked; None where nothing
            asked.
        dtype: The default dtype; empty where any will do.
        globals: Values of Python modules that are part of the graph.
        held: Values of classes, closures and argument objects, and the environment, that are part of the graph.
        tensors: The tensors of the model that the graph takes, with the sizes of those that are no parameters.
    """

    constants: Mapping[str, Any] = field(default_factory=dict)
    same: tuple[int, ...] = ()
    gradients: tuple[bool | None, ...] | None = None
    trained: Mapping[str, bool] | None = None
    strides: Strides | None = None
    dtype: str = ""
    globals: tuple[GlobalValue, ...] = ()
    held: tuple[HeldValue, ...] = ()
    tensors: TakenTensors = field(default_factory=dict)

    def check(self, leaves: Sequence[Any], names: Callable[[], Sequence[str]] = tuple) -> None:
        """Raise ArgumentError where flat arguments are not what was assumed of them."""
        for place, captured in self.constants.items():
            value = leaves[int(place)]
            if not same_constant(value, captured):
                raise ArgumentError(
                    f"{_name(names(), int(place))} is {_shown(value)}; the model was captured with {_shown(captured)}, "
                    f"which is part of its graph."
                )
        if is_traced():
            return
        if self.same and self.same != aliases(leaves):
            raise ArgumentError("one tensor is given as several arguments, and the graph was captured otherwise.")
        given = zip(self.gradients or (), gradients_of(leaves), strict=self.gradients is not None)
        if not _transformed() and any(assumed not in (None, now) for assumed, now in given):
            raise ArgumentError(
                "the model asks which tensors need gradients or whether they are on, and the graph was captured with "
                "others."
            )
        if self.strides is not None and not all(map(_same_strides, self.strides, strides_of(leaves))):
            raise ArgumentError("the model asks for strides, and the graph was captured with others.")

    def check_world(self, model: nn.Module) -> None:
        """Raise ArgumentError where the model's parameters or Python's globals are not what was assumed of them."""
        if self.trained is not None and not _transformed() and self.trained != trained_in(model, self.trained):
            raise ArgumentError("other parameters need gradients than when the graph was captured.")
        if self.dtype and self.dtype != str(torch.get_default_dtype()):
            raise ArgumentError(f"the default dtype is {torch.get_default_dtype()} and was {self.dtype}.")
        for held in self.globals:
            now = value_at(sys.modules.get(held.module), held.steps)
            if not same(now, held.value):
                place = ".".join(map(str, (held.module, *held.steps)))
                raise ArgumentError(f"{place} is {now!r} and was {held.value!r} when the graph was captured.")

        for value in self.held:
            if changed := value.changed():
                raise ArgumentError(f"{changed} when the graph was captured.")

    def check_tensors(self, model: nn.Module, submodule: Callable[[str], nn.Module]) -> None:
        """Raise ArgumentError where the model's tensors are not what was assumed of them.

        Args:
            model: The model.
            submodule: Its module at a path.
        """
        if other := first_other_tensor(self.tensors, model, submodule):
            raise ArgumentError(f"{other}, when the graph was captured.")

    def fits(self, count: int) -> bool:
        """Whether it can be of a graph with so many inputs."""
        lengths = {len(v) for v in (self.same, self.strides, self.gradients and self.gradients[1:]) if v}
        return lengths <= {count} and all(n.isdecimal() and int(n) < count for n in self.constants)

    def in_file(self) -> "Assumed":
        """What of it still tells in another process: plain constants and all that is told from the arguments."""
        plain = {n: v for n, v in self.constants.items() if isinstance(v, bool | int | float | str | None)}
        return Assumed(plain, self.same, self.gradients, strides=self.strides, tensors=self.tensors)


def _transformed() -> bool:
    """Whether a functorch transform is at work, whose tensors say nothing of the gradients that it takes."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def constants_of(leaves: Sequence[Any]) -> dict[str, Any]:
    """The flat arguments that are no tensors, by their places."""
    return {str(i): x for i, x in enumerate(leaves) if not isinstance(x, Tensor)}


def aliases(leaves: Sequence[Any]) -> tuple[int, ...]:
    """For each flat argument the first place that holds the same tensor."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(x), i) if isinstance(x, Tensor) else i for i, x in enumerate(leaves))


def gradients_of(leaves: Iterable[Any]) -> tuple[bool, ...]:
    """Whether gradients are on, then whether each flat argument needs one."""
    return torch.is_grad_enabled(), *(isinstance(x, Tensor) and x.requires_grad for x in leaves)


def trained_in(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, bool]:
    """Whether parameters need gradients, by name; all of them where no names are given."""
    held = dict(model.named_parameters())
    return {n: held[n].requires_grad for n in (held if names is None else names) if n in held}


def strides_of(leaves: Sequence[Any]) -> Strides:
    """The strides of each flat argument, None where it is contiguous or no tensor."""
    return tuple(
        tuple(x.stride()) if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_contiguous() else None
        for x in leaves
    )


def _same_strides(captured: tuple[int, ...] | None, given: tuple[int, ...] | None) -> bool:
    return captured == given or (captured == () and given is not None)


def same_constant(value: Any, captured: Any) -> bool:
    """Whether two values mean the same to a graph: of one type, and equal, zeros in sign, or both no number."""
    if isinstance(value, Tensor) or type(value) is not type(captured):
        return False
    if isinstance(value, float):
        same_sign = math.copysign(1, value) == math.copysign(1, captured)  # 0.0 and -0.0 are equal
        return (value == captured and same_sign) or (math.isnan(value) and math.isnan(captured))
    return value is captured or bool(value == captured)


def _name(names: Sequence[str], place: int) -> str:
    return f"argument {names[place]!r}" if place < len(names) else f"flat argument {place}"


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else f"{value!r:.60}"
