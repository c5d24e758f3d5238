"""What is known of a stored node's value: sizes, some free, dtype and device as JSON, and back as a fake value."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.symbol import SymT, symbol_is_type

from attnres_fx.capture.size_guards import UnknownOperation, to_expression
from attnres_fx.conversion.stored.arguments import ArgumentReader, DeviceMap, to_data
from attnres_fx.errors import SaveError

_GREATEST_POWER = 8
_DEEPEST = 40


class NoValue(ValueError):
    """A value that is not written: nothing depends on it being known."""


class ValueWriter:
    """Writes the values of one graph.

    Attributes:
        symbols: By name, the size it had in the trace, None where it depends on data, and the least and the greatest
            it may have.
    """

    def __init__(self) -> None:
        self.symbols: dict[str, list[int | None]] = {}

    def write(self, value: Any) -> Any:
        """A value as JSON.

        Raises:
            NoValue: It has no such form.
        """
        if isinstance(value, torch.Tensor):
            sizes = [self._size(s) for s in value.shape]
            strided = value.layout == torch.strided
            strides = None if not strided or value.is_contiguous() else [self._size(s) for s in value.stride()]
            dtype, device = str(value.dtype).removeprefix("torch."), str(value.device)
            return {"tensor": [dtype, sizes, device, strides, value.requires_grad]}
        if isinstance(value, torch.SymInt):
            return {"number": self._size(value)}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.write(v) for v in value]}
        try:
            return {"plain": to_data(value)}
        except SaveError as error:
            raise NoValue from error

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        env = size.node.shape_env
        for symbol in expression.free_symbols:
            if str(symbol) not in self.symbols:
                known = getattr(env, "backed_var_to_val", None) or env.var_to_val
                bounds = env.var_to_range.get(symbol)
                limits = (None, None) if bounds is None else (_bound(bounds.lower), _bound(bounds.upper))
                hint = known.get(symbol)
                self.symbols[str(symbol)] = [None if hint is None else int(hint), *limits]
        try:
            return to_expression(expression)
        except UnknownOperation as error:
            raise NoValue from error


def _bound(value: Any) -> int | None:
    return int(value) if value.is_Integer and abs(value) < 2**31 else None


class ValueReader:
    """Reads the values of one graph, as fake ones of one mode."""

    def __init__(self, symbols: Any, device: DeviceMap) -> None:
        self.device = device
        self.plain = ArgumentReader({}, device)
        env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
        self.sizes: dict[str, Any] = {}
        if not isinstance(symbols, dict):
            raise SaveError("the sizes of a program are no table")
        for name, limits in symbols.items():
            self.sizes[name] = _symbol(env, name, limits)

    def read(self, data: Any, depth: int = 0) -> Any:
        """The value that `ValueWriter.write` was given.

        Raises:
            SaveError: The data has another form.
        """
        if depth > _DEEPEST:
            raise SaveError("a value is nested too deeply")
        match data:
            case {"tensor": [dtype, list() as sizes, device, None | list() as strides, bool() as grad]}:
                return self._tensor(dtype, sizes, device, strides, grad)
            case {"number": size}:
                return self._size(size)
            case {"tuple": list() as values}:
                return tuple(self.read(v, depth + 1) for v in values)
            case {"list": list() as values}:
                return [self.read(v, depth + 1) for v in values]
            case {"plain": value}:
                return self.plain.read(value)
        raise SaveError(f"{data!r:.60} is no value of a node")

    def _tensor(self, dtype: Any, sizes: list[Any], device: Any, strides: list[Any] | None, grad: bool) -> torch.Tensor:
        kind = self.plain.read({"dtype": dtype})
        place = self.plain.read({"device": device})
        shape = [self._size(s) for s in sizes]
        with self.mode:
            if strides is None:
                made = torch.empty(shape, dtype=kind, device=place)
            else:
                made = torch.empty_strided(shape, [self._size(s) for s in strides], dtype=kind, device=place)
        return made.requires_grad_(True) if grad else made

    def _size(self, expression: Any, depth: int = 0) -> Any:
        if type(expression) is int and 0 <= abs(expression) < 2**62:
            return expression
        if type(expression) is float and math.isfinite(expression):
            return expression
        if isinstance(expression, str) and expression in self.sizes:
            return self.sizes[expression]
        if isinstance(expression, list) and expression and depth < _DEEPEST and expression[0] in _OPERATIONS:
            operands = [self._size(e, depth + 1) for e in expression[1:]]
            if expression[0] != "Pow" or (type(operands[-1]) is int and 0 <= operands[-1] <= _GREATEST_POWER):
                return _OPERATIONS[expression[0]](*operands)
        raise SaveError(f"{expression!r:.60} is no size")


def _folded(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def fold(first: Any, *others: Any) -> Any:
        for other in others:
            first = function(first, other)
        return first

    return fold


_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "Add": _folded(operator.add),
    "Mul": _folded(operator.mul),
    "Pow": operator.pow,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Max": _folded(torch.sym_max),
    "Min": _folded(torch.sym_min),
    "ToFloat": torch.sym_float,
    "TruncToInt": torch.sym_int,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
}


def _symbol(env: ShapeEnv, name: str, limits: Any) -> Any:
    """A free size of the same name in a fresh environment."""
    match limits:
        case [None | int() as hint, None | int() as low, None | int() as high] if name.isidentifier():
            pass
        case _:
            raise SaveError(f"{name!r:.40} is no free size")
    size: Any
    if hint is None:
        size = env.create_unbacked_symint()
        symbol = size.node.expr
    else:
        symbol = sympy.Symbol(name, integer=True, positive=True)
        if symbol_is_type(symbol, SymT.UNBACKED_INT):
            raise SaveError(f"the size {name!r:.40} depends on data and has a value")
        add = getattr(env, "add_backed_var_to_val", None) or env.add_var_to_val
        add(symbol, hint)
        size = env.create_symintnode(symbol, hint=hint)
    least, greatest = (0 if low is None else low), (int_oo if high is None else high)
    env.constrain_symbol_range(symbol, compiler_min=least, compiler_max=greatest)
    return size
