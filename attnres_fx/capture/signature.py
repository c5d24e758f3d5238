"""How a captured program is called: arguments bound, checked and flattened."""

import inspect
import itertools
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnres_fx.capture.assumed import same_constant
from attnres_fx.errors import ArgumentError


@dataclass(frozen=True)
class CallSignature:
    """The arguments a model was captured with, in the order in which its own `forward` names them.

    Attributes:
        positional: names that may be given by position.
        args: names of the arguments captured by position, in order.
        kwargs: names of the arguments captured by keyword.
        constants: captured values that are no tensors, by name; a call may leave them out or repeat them, but not
            change them.
        bound: names of the constants that the capture itself bound.
        not_defaults: names of the constants that are not the model's own defaults.
    """

    positional: tuple[str, ...]
    args: tuple[str, ...]
    kwargs: tuple[str, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    bound: tuple[str, ...] = ()
    not_defaults: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = [n for n in (*self.args, *self.kwargs) if n not in self.bound]
        return f"({', '.join(names)})"

    def to_inspect(self) -> inspect.Signature:
        """As Python shows it: arguments that cannot be given by position are keyword-only."""
        captured = (*self.args, *self.kwargs)
        leading = list(itertools.takewhile(captured.__contains__, self.positional))
        empty = inspect.Parameter.empty
        ordered = [*leading, *(n for n in captured if n not in leading)]
        # Python wants arguments without a default first; one after a default is keyword-only here.
        parameters, optional = [], False
        for name in ordered:
            default = self.constants.get(name, empty)
            optional = optional or default is not empty
            by_position = name in leading and (not optional or default is not empty)
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if by_position else inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, kind, default=default))
        return inspect.Signature(sorted(parameters, key=lambda p: p.kind))

    @property
    def bound_values(self) -> dict[str, Any]:
        """The values of `bound`, by name."""
        return {n: self.constants[n] for n in self.bound}

    def takes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives the arguments that were captured, by their names.

        Args:
            args: By position.
            kwargs: By keyword.
        """
        given = {*self.positional[: len(args)], *kwargs}
        known = {*self.args, *self.kwargs}
        return len(args) <= len(self.positional) and given <= known and known - given <= self.constants.keys()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call in the captured structure.

        Args:
            args: by position.
            kwargs: by keyword.

        Returns:
            The values of `self.args`, and those of `self.kwargs` by name.

        Raises:
            ArgumentError: an argument is missing, unknown, given twice, or another constant; it is named.
        """
        given = dict(kwargs)
        if len(args) > len(self.positional):
            raise ArgumentError(f"got {len(args)} positional arguments; the model was captured with {self}.")
        for name, value in zip(self.positional, args, strict=False):
            if name in given:
                raise ArgumentError(f"argument {name!r} was given twice, by position and by keyword.")
            given[name] = value
        for name in given:
            if name not in self.args and name not in self.kwargs:
                raise ArgumentError(f"unexpected argument {name!r}: the model was captured with {self}.")
        return tuple(self._one(n, given) for n in self.args), {n: self._one(n, given) for n in self.kwargs}

    def require_all_but_defaults(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise ArgumentError where a call leaves out a constant that was not captured at its default."""
        given = {*self.positional[: len(args)], *kwargs}
        for name in self.not_defaults:
            if name not in given:
                raise ArgumentError(
                    f"argument {name!r} was left out; the model was captured with {name}={self.constants[name]!r}, "
                    f"which is not what leaving it out means."
                )

    def _one(self, name: str, given: Mapping[str, Any]) -> Any:
        if name not in self.constants:
            if name not in given:
                raise ArgumentError(f"missing argument {name!r}: the model was captured with {self}.")
            return given[name]
        captured = self.constants[name]
        if name in given and not _same(given[name], captured):
            raise ArgumentError(
                f"argument {name!r} is {given[name]!r}; the model was captured with {name}={captured!r}, which "
                f"is part of its graph."
            )
        return captured


def _same(value: Any, captured: Any) -> bool:
    if value is captured:
        return True
    (held, spec), (known, known_spec) = pytree.tree_flatten(value), pytree.tree_flatten(captured)
    return spec == known_spec and all(map(same_constant, held, known))


def has_own_call(model: nn.Module) -> bool:
    """Whether a model's class says itself what a call of it does."""
    return type(model).__call__ is not nn.Module.__call__


def parameters_of_call(model: nn.Module) -> inspect.Signature:
    """The parameters of a call of a model: its forward's, unless its class names others in a `__call__` of its own."""
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if has_own_call(model):
        shown = inspect.signature(types.MethodType(type(model).__call__, model))
        if any(p.kind not in anything for p in shown.parameters.values()):
            return shown
    return inspect.signature(model.forward)


def signature_of(
    called: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], bound: Sequence[str] = ()
) -> CallSignature:
    """Signature of a model captured with `args` and `kwargs`, named as its call names them."""
    parameters = list(called.parameters.values())
    ordered = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in ordered]
    extra = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), "args")
    names += [f"{extra}_{i}" for i in range(len(names), len(args))]
    taken = tuple(names[: len(args)])
    values = {**dict(zip(taken, args, strict=True)), **kwargs}
    constants = constants_in(values)
    defaults = {p.name: p.default for p in parameters}
    others = [
        n for n, v in constants.items() if n not in bound and not _same(v, defaults.get(n, inspect.Parameter.empty))
    ]
    return CallSignature(tuple(names), taken, tuple(kwargs), constants, tuple(bound), tuple(others))


def constants_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that hold no tensors, and so are part of a captured graph."""
    return {n: v for n, v in values.items() if _is_constant(v)}


def _is_constant(value: Any) -> bool:
    return not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def child_specs(spec: Any) -> list[Any]:
    """The specs that a pytree's spec is made of."""
    children = getattr(spec, "children", None)
    return list(children() if callable(children) else spec.children_specs)


@dataclass(frozen=True)
class InputShape:
    """A tensor argument's sizes and kind of dtype.

    Attributes:
        name: of the argument.
        sizes: of each dimension, a number where it is fixed and a symbol's name where it is free.
        kind: `"floating"`, `"integer"`, `"boolean"` or `"complex"`; `""` where it does not matter.
        example: its sizes in the example; empty where they are not known.
    """

    name: str
    sizes: tuple[int | str, ...]
    kind: str = ""
    example: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.sizes))}]"


def dtype_kind(tensor: torch.Tensor) -> str:
    """What sort of numbers a tensor holds, whatever their precision."""
    if tensor.is_floating_point():
        return "floating"
    if tensor.is_complex():
        return "complex"
    return "boolean" if tensor.dtype == torch.bool else "integer"


def check_shapes(
    expected: Sequence[InputShape | None], leaves: Sequence[Any], ranges: Mapping[str, tuple[int, int | None]]
) -> None:
    """Raise ArgumentError where a tensor has a shape that the captured graph was not made for."""
    seen: dict[str, tuple[Any, str]] = {}
    for shape, leaf in zip(expected, leaves, strict=True):
        if shape is None:
            continue
        if not isinstance(leaf, torch.Tensor):
            raise ArgumentError(f"argument {shape.name!r} is a {type(leaf).__name__}; it was captured as a tensor.")
        if shape.kind and dtype_kind(leaf) != shape.kind:
            raise ArgumentError(f"argument {shape.name!r} is {leaf.dtype}; it was captured with {shape.kind} values.")
        if leaf.dim() != len(shape.sizes):
            raise ArgumentError(f"argument {shape.name!r} has {leaf.dim()} dimensions; it was captured as {shape}.")
        for i, (size, wanted) in enumerate(zip(leaf.shape, shape.sizes, strict=True)):
            if isinstance(wanted, int):
                if size != wanted:
                    raise ArgumentError(
                        f"argument {shape.name!r} has size {size} in dimension {i}; the graph was captured with "
                        f"{wanted} fixed there."
                    )
                continue
            low, high = ranges.get(wanted, (0, None))
            if size < low or (high is not None and size > high):
                raise ArgumentError(
                    f"argument {shape.name!r} has size {size} in dimension {i}; the graph holds for sizes from "
                    f"{low} to {high if high is not None else 'any'}."
                )
            first = seen.setdefault(wanted, (size, f"dimension {i} of {shape.name!r}"))
            if first[0] != size:
                raise ArgumentError(
                    f"argument {shape.name!r} has size {size} in dimension {i}, but {first[1]} is {first[0]}: "
                    f"they were captured as one size."
                )
