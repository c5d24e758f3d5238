"""The size guards of a graph as JSON, and back; those of an export are translated from its own messages."""

import ast
import re
import types
from collections.abc import Sequence
from typing import Any

from attnres_fx.capture.size_guards import KNOWN_OPERATIONS, Expression, SizeGuards
from attnres_fx.errors import SaveError

_PREFIX = "Guard failed: "
_DEEPEST = 40
_GREATEST_POWER = 8

_BINARY: dict[type, str] = {
    ast.Add: "Add",
    ast.Mult: "Mul",
    ast.Mod: "PythonMod",
    ast.FloorDiv: "FloorDiv",
    ast.Pow: "Pow",
}
_CALLED = {n: n for n in ("Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv")} | {"max": "Max", "min": "Min"}
_COMPARED: dict[type, str] = {
    ast.Eq: "Eq",
    ast.NotEq: "Ne",
    ast.Lt: "Lt",
    ast.LtE: "Le",
    ast.Gt: "Gt",
    ast.GtE: "Ge",
}


def guards_to_data(guards: Any, names: Sequence[str]) -> Any:
    """Guards as JSON, None where there are none.

    Args:
        guards: SizeGuards, or the check that an export has.
        names: Of the graph's inputs.

    Raises:
        SaveError: A condition cannot be written down; it is shown.
    """
    if guards is None:
        return None
    if not isinstance(guards, SizeGuards):
        guards = _of_export(guards, names)
    places = {name: list(place) for name, place in guards.places.items()}
    return {"places": places, "conditions": list(guards.conditions), "names": list(guards.names)}


def guards_from_data(data: Any, count: int) -> SizeGuards | None:
    """What `guards_to_data` was given; `count` is the number of the graph's inputs.

    Raises:
        SaveError: The data has another form.
    """
    match data:
        case None:
            return None
        case {"places": dict() as places, "conditions": list() as conditions, "names": list() as names, **rest}:
            if rest or len(names) != count or not all(isinstance(n, str) for n in names):
                raise SaveError("the guards do not name the inputs")
            for name, place in places.items():
                if not _is_place(place, count):
                    raise SaveError(f"the size {name!r:.40} of a guard is at {place!r:.40}, which is no input")
            for condition in conditions:
                _check(condition, places)
            where = {name: (place[0], place[1]) for name, place in places.items()}
            return SizeGuards(where, tuple(conditions), tuple(names))
    raise SaveError(f"{data!r:.60} are no guards")


def _is_place(place: Any, count: int) -> bool:
    numbers = isinstance(place, list) and len(place) == 2 and all(type(p) is int for p in place)
    return numbers and 0 <= place[0] < count and 0 <= place[1] < 64


def _check(expression: Any, places: Any, depth: int = 0) -> None:
    if (
        type(expression) is int
        or (type(expression) is float and depth)
        or (isinstance(expression, str) and expression in places)
    ):
        return
    if isinstance(expression, list) and len(expression) > 1 and depth < _DEEPEST:
        name, *operands = expression
        power = name == "Pow" and not (type(operands[-1]) is int and abs(operands[-1]) <= _GREATEST_POWER)
        if isinstance(name, str) and name in KNOWN_OPERATIONS and not power:
            for operand in operands:
                _check(operand, places, depth + 1)
            return
    raise SaveError(f"{expression!r:.60} is no condition on sizes")


def _of_export(guards: Any, names: Sequence[str]) -> SizeGuards:
    """The conditions that an export checks, from the messages it would raise."""
    checks = [c for c in _codes(guards) if "_assert" in c.co_names]
    if not checks:
        raise SaveError("the graph checks its inputs by code of its own, which a file cannot hold")
    constants = [c for code in checks for c in code.co_consts]
    messages = [c for c in constants if isinstance(c, str) and c.startswith(_PREFIX)]
    places: dict[str, tuple[int, int]] = {}
    conditions = []
    for message in messages:
        text = message.removeprefix(_PREFIX)
        try:
            conditions.append(_translated(ast.parse(text, mode="eval").body, names, places))
        except (SyntaxError, KeyError, ValueError) as error:
            raise SaveError(f"the graph's check {text!r} cannot be written as a condition on sizes") from error
    return SizeGuards(places, tuple(conditions), tuple(names))


def _codes(function: Any, depth: int = 0) -> list[types.CodeType]:
    """The code of a function, and of those that it wraps."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None or depth > 3:
        return []
    cells = getattr(function, "__closure__", None) or ()
    return [code, *(c for cell in cells for c in _codes(cell.cell_contents, depth + 1))]


def _translated(node: Any, names: Sequence[str], places: dict[str, tuple[int, int]]) -> Expression:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.Not() as op, operand=operand):
            return [*(["Not"] if isinstance(op, ast.Not) else ["Mul", -1]), _translated(operand, names, places)]
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return ["Add", _translated(left, names, places), ["Mul", -1, _translated(right, names, places)]]
        case ast.BinOp(left=left, op=op, right=right):
            return [_BINARY[type(op)], *(_translated(x, names, places) for x in (left, right))]
        case ast.BoolOp(op=op, values=values):
            return ["And" if isinstance(op, ast.And) else "Or", *(_translated(v, names, places) for v in values)]
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _chain([left, *others], ops, names, places)
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as args) if name in _CALLED:
            return [_CALLED[name], *(_translated(a, names, places) for a in args)]
        case ast.Subscript(value=ast.Call(func=ast.Attribute(value=source, attr="size"), args=[]), slice=index):
            return _place(ast.unparse(source), ast.literal_eval(index), names, places)
    raise ValueError(ast.unparse(node))


def _chain(values: list[Any], ops: list[Any], names: Sequence[str], places: dict[str, tuple[int, int]]) -> Expression:
    sides = [_translated(v, names, places) for v in values]
    links = [[_COMPARED[type(op)], sides[i], sides[i + 1]] for i, op in enumerate(ops)]
    return links[0] if len(links) == 1 else ["And", *links]


def _place(source: str, dimension: int, names: Sequence[str], places: dict[str, tuple[int, int]]) -> str:
    """The name of a size of an input, which an export names after its path in the arguments."""
    name = re.sub(r"\W+", "_", source).strip("_")
    size = f"{name}.{dimension}"
    places[size] = (list(names).index(name), dimension)
    return size
