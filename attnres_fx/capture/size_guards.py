"""What a tracer took for granted of the free sizes, as expressions that can be checked, shown and written to a file."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from attnres_fx.capture.sizes import sizes_of

#: A size by name, a number, or an operation on such: `["Eq", ["Mod", "s0", 2], 0]`.
Expression = Any

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda *xs: sum(xs),
    "Mul": lambda *xs: math.prod(xs),
    "Pow": operator.pow,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Max": max,
    "Min": min,
    "Eq": operator.eq,
    "Ne": operator.ne,
    "Lt": operator.lt,
    "Le": operator.le,
    "Gt": operator.gt,
    "Ge": operator.ge,
    "And": lambda *xs: all(xs),
    "Or": lambda *xs: any(xs),
    "Not": operator.not_,
    "ToFloat": float,
    "TruncToInt": math.trunc,
    "FloorToInt": math.floor,
    "CeilToInt": math.ceil,
    "RoundToInt": round,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
}

#: What an expression may do.
KNOWN_OPERATIONS = frozenset(_OPERATIONS)

_NAMES = {
    "Equality": "Eq",
    "Unequality": "Ne",
    "StrictLessThan": "Lt",
    "LessThan": "Le",
    "StrictGreaterThan": "Gt",
    "GreaterThan": "Ge",
}

_SIGNS = {"Eq": "==", "Ne": "!=", "Lt": "<", "Le": "<=", "Gt": ">", "Ge": ">=", "Mod": "%", "PythonMod": "%"}


class UnknownOperation(ValueError):
    """A size expression uses an operation that is not known here."""


def to_expression(value: Any) -> Expression:
    """A sympy expression over sizes as plain data.

    Raises:
        UnknownOperation: It holds something that this grammar has no word for.
    """
    if isinstance(value, int):
        return value
    if isinstance(value, sympy.Integer):
        return int(value)
    if isinstance(value, float | sympy.Float):
        return float(value)
    if isinstance(value, sympy.Rational):
        return ["FloatTrueDiv", int(value.p), int(value.q)]
    if isinstance(value, sympy.Symbol):
        return str(value)
    if value in (sympy.true, sympy.false):
        return ["Eq", 0, 0 if value == sympy.true else 1]
    name = type(value).__name__
    name = _NAMES.get(name, name)
    if name not in _OPERATIONS:
        raise UnknownOperation(f"{name} in {value}")
    return [name, *map(to_expression, value.args)]


def evaluate(expression: Expression, sizes: Mapping[str, Any]) -> Any:
    """The value of an expression for these sizes."""
    if isinstance(expression, str):
        return sizes[expression]
    if isinstance(expression, int | float):
        return expression
    name, *operands = expression
    return _OPERATIONS[name](*[evaluate(o, sizes) for o in operands])


def shown(expression: Expression, names: Mapping[str, str]) -> str:
    """An expression in words, with a name for each size."""
    if isinstance(expression, str):
        return names.get(expression, expression)
    if isinstance(expression, int | float):
        return str(expression)
    name, *operands = expression
    words = [shown(o, names) for o in operands]
    if name in _SIGNS and len(words) == 2:
        return f"{words[0]} {_SIGNS[name]} {words[1]}"
    if name == "Add":
        return f"({' + '.join(words)})"
    if name == "Mul":
        return " * ".join(words)
    return f"{name}({', '.join(words)})"


@dataclass(frozen=True)
class SizeGuards:
    """Conditions on the sizes of a graph's inputs, checked at every call.

    Attributes:
        places: By the name of a size, the input and the dimension it is read from.
        conditions: Expressions that must hold.
        names: The name of each input, for messages.
    """

    places: Mapping[str, tuple[int, int]]
    conditions: tuple[Expression, ...]
    names: tuple[str, ...]

    def __call__(self, *inputs: Any) -> None:
        """Check the flat inputs of a call.

        Raises:
            AssertionError: A condition does not hold; it says which.
        """
        if not self.conditions:
            return
        sizes = {name: inputs[i].shape[d] for name, (i, d) in self.places.items()}
        for condition in self.conditions:
            if not evaluate(condition, sizes):
                words = {s: f"size {d} of {self.names[i]!r}" for s, (i, d) in self.places.items()}
                raise AssertionError(f"{shown(condition, words)} does not hold")


def size_guards(values: Sequence[Any], names: Sequence[str]) -> tuple[SizeGuards, dict[str, tuple[int, int | None]]]:
    """The conditions and the ranges of the free sizes of traced inputs.

    Args:
        values: The fake value of each input, None where it has none.
        names: The name of each input.

    Returns:
        The conditions, and by the name of a size as the shapes show it the least and the greatest it may have, None
        where there is no greatest. A least of 0 says that no size was found wrong; sizes of 1 are for the caller to
        try.

    Raises:
        UnknownOperation: A condition cannot be written down.
    """
    places: dict[str, tuple[int, int]] = {}
    extra: list[Expression] = []
    shape_env = None
    for i, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            continue
        for d, size in enumerate(value.shape):
            if not isinstance(size, torch.SymInt):
                continue
            shape_env = size.node.shape_env
            raw = size.node._expr
            if isinstance(raw, sympy.Symbol):
                places.setdefault(str(raw), (i, d))
            own = f"{i}.{d}"
            if not isinstance(size.node.expr, sympy.Symbol):
                places[own] = (i, d)
                extra.append(["Eq", own, to_expression(size.node.expr)])
    if shape_env is None:
        return SizeGuards({}, (), tuple(names)), {}
    conditions = [to_expression(g.expr) for g in shape_env.guards if _can_be_told(g.expr, places)]
    ranges = {str(s): sizes_of(shape_env.var_to_range[s]) for s in shape_env.var_to_range if str(s) in places}
    unique = [c for i, c in enumerate([*conditions, *extra]) if c not in [*conditions, *extra][:i]]
    return SizeGuards(places, tuple(unique), tuple(names)), ranges


def _can_be_told(expression: Any, places: Mapping[str, Any]) -> bool:
    """Whether every symbol is the size of an input; others belong to data, and the graph itself checks them."""
    return all(str(s) in places for s in expression.free_symbols)
