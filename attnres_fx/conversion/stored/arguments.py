"""The arguments of a stored operation as JSON, and back.

Numbers, text and lists stand for themselves; everything else is an object of one entry, which says what it is.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from attnres_fx.conversion.stored.operations import function_named, name_of
from attnres_fx.errors import SaveError

_DEEPEST = 24
_INTEGERS = 2**63

_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_LAYOUTS = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.layout)}
_FORMATS = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.memory_format)}
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DEVICE = re.compile(r"[a-z]+(:\d{1,4})?")

#: Changes the device that a file names to where it is to be now.
DeviceMap = Callable[[torch.device], torch.device]


def to_data(value: Any) -> Any:
    """An argument as JSON. Nodes are written by name.

    Raises:
        SaveError: It is of a kind that has no such form.
    """
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int and -_INTEGERS <= value < _INTEGERS:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Node):
        return {"node": value.name}
    if type(value) in _CONTAINERS or type(value).__name__ in ("immutable_list", "immutable_dict"):
        return _container_to_data(value)
    for kind, (type_, write) in _LEAVES.items():
        if isinstance(value, type_):
            return {kind: write(value)}
    if callable(value):
        return {"function": name_of(value)}
    raise SaveError(f"the argument {value!r:.60} is of type {type(value).__name__}, which a file cannot hold")


def _container_to_data(value: Any) -> Any:
    if isinstance(value, torch.Size):
        return {"size": [to_data(v) for v in value]}
    if isinstance(value, tuple):
        return {"tuple": [to_data(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[to_data(k), to_data(v)] for k, v in value.items()]}
    return [to_data(v) for v in value]


_CONTAINERS = (list, tuple, dict, torch.Size)
_LEAVES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "dtype": (torch.dtype, lambda v: str(v).removeprefix("torch.")),
    "device": (torch.device, str),
    "layout": (torch.layout, lambda v: str(v).removeprefix("torch.")),
    "memory_format": (torch.memory_format, lambda v: str(v).removeprefix("torch.")),
    "slice": (slice, lambda v: [to_data(x) for x in (v.start, v.stop, v.step)]),
    "range": (range, lambda v: [v.start, v.stop, v.step]),
    "ellipsis": (type(Ellipsis), lambda _: True),
    "complex": (complex, lambda v: [to_data(v.real), to_data(v.imag)]),
}


class ArgumentReader:
    """Reads arguments.

    Args:
        nodes: The nodes that an argument may be, by name.
        device: Where what the file has on a device is now.
    """

    def __init__(self, nodes: Mapping[str, Node], device: DeviceMap) -> None:
        self.nodes, self.device = nodes, device

    def read(self, data: Any, depth: int = 0) -> Any:
        """What `to_data` was given.

        Raises:
            SaveError: The data has another form.
        """
        if depth > _DEEPEST:
            raise SaveError("an argument is nested too deeply")
        if data is None or type(data) in (bool, str):
            return data
        if type(data) is int and -_INTEGERS <= data < _INTEGERS:
            return data
        if type(data) is float and math.isfinite(data):
            return data
        if isinstance(data, list):
            return [self.read(v, depth + 1) for v in data]
        if isinstance(data, dict) and len(data) == 1:
            ((kind, value),) = data.items()
            return self._one(kind, value, depth + 1)
        raise SaveError(f"{data!r:.60} is no argument")

    def _one(self, kind: str, value: Any, depth: int) -> Any:
        table = _TABLES.get(kind)
        if table is not None:
            if not isinstance(value, str) or value not in table:
                raise SaveError(f"{value!r:.60} is no {kind}")
            return table[value]
        match kind, value:
            case "node", str() if value in self.nodes:
                return self.nodes[value]
            case "function", str():
                return function_named(value)
            case "device", str() if _DEVICE.fullmatch(value):
                return self.device(torch.device(value))
            case "ellipsis", True:
                return ...
            case (("tuple" | "size" | "slice" | "range" | "complex"), list()):
                return self._sequence(kind, [self.read(v, depth) for v in value])
            case "dict", list() if all(isinstance(e, list) and len(e) == 2 for e in value):
                return {self.read(k, depth): self.read(v, depth) for k, v in value}
        raise SaveError(f"{ {kind: value}!r:.60} is no argument")

    def _sequence(self, kind: str, values: list[Any]) -> Any:
        numbers = all(type(v) is int or (kind == "complex" and type(v) is float) for v in values)
        match kind, values:
            case "tuple", _:
                return tuple(values)
            case "slice", [start, stop, step]:
                return slice(start, stop, step)
            case "size", _ if numbers and min(values, default=0) >= 0:
                return torch.Size(values)
            case "range", [start, stop, step] if numbers and step:
                return range(start, stop, step)
            case "complex", [real, imaginary] if numbers:
                return complex(real, imaginary)
        raise SaveError(f"{values!r:.60} is no {kind}")


_TABLES: dict[str, Mapping[str, Any]] = {
    "dtype": _DTYPES,
    "layout": _LAYOUTS,
    "memory_format": _FORMATS,
    "float": _FLOATS,
}
