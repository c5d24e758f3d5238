"""Costs as plain dicts and lists, as a plan's file holds them and as a user may give them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.model_costs import CarriedValue, ModelCosts, StreamCost, SublayerCost

Record = TypeVar("Record", SublayerCost, StreamCost, CarriedValue)


def costs_to_dict(costs: ModelCosts) -> dict[str, Any]:
    """What `costs_from_dict` takes: dicts, lists, strings and numbers only, fit for JSON."""
    found = {name: value for name, value in dataclasses.asdict(costs).items() if name != "tied"}
    lists = {name: list(value) for name, value in found.items() if isinstance(value, tuple)}
    lists["carried"] = [{**value, "used": list(value["used"])} for value in lists["carried"]]
    return {**found, **lists, "tied": [[size, list(places)] for size, places in costs.tied]}


def costs_from_dict(given: Any) -> ModelCosts:
    """Costs from what `costs_to_dict` made, or a user wrote; `carried` and `tied` may be left out.

    Raises PlanError, naming the entry, for what is missing, unknown, of another type, negative or not finite, for
    streams that do not cover the sublayers, and for places that the chain does not have.
    """
    fields = _fields(given, "costs", ModelCosts)
    sublayers = tuple(_record(SublayerCost, v, at) for v, at in _items(fields["sublayers"], "sublayers"))
    count = len(sublayers)
    return ModelCosts(
        sublayers=sublayers,
        before=_record(SublayerCost, fields["before"], "before"),
        after=_record(SublayerCost, fields["after"], "after"),
        streams=tuple(_record(StreamCost, v, at) for v, at in _items(fields["streams"], "streams")),
        carried=tuple(_carried(v, at, count) for v, at in _items(fields.get("carried", ()), "carried")),
        tied=tuple(_tied(v, at, count) for v, at in _items(fields.get("tied", ()), "tied")),
    )


def _fields(given: Any, at: str, record: type) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise PlanError(f"{at} is a {type(given).__name__}; it must be a mapping of names to values.")
    known = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(record)}
    missing = [name for name, needed in known.items() if needed and name not in given]
    unknown = [name for name in given if name not in known]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has the unknown entry {unknown[0]!r}"
        raise PlanError(f"{at} {wrong}; its entries are {', '.join(known)}.")
    return given


def _items(given: Any, at: str) -> list[tuple[Any, str]]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise PlanError(f"{at} is a {type(given).__name__}; it must be a list.")
    return [(value, f"{at}[{i}]") for i, value in enumerate(given)]


def _record(record: type[Record], given: Any, at: str) -> Record:
    fields = _fields(given, at, record)
    return record(**{name: _READERS[name](value, f"{at}.{name}") for name, value in fields.items()})


def _text(given: Any, at: str) -> str:
    if not isinstance(given, str):
        raise PlanError(f"{at} is {given!r}; it must be a text.")
    return given


def _flag(given: Any, at: str) -> bool:
    if not isinstance(given, bool):
        raise PlanError(f"{at} is {given!r}; it must be true or false.")
    return given


def _amount(given: Any, at: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf:
        raise PlanError(f"{at} is {given!r}; it must be a finite number that is not negative.")
    return float(given)


def _count(given: Any, at: str) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise PlanError(f"{at} is {given!r}; it must be a whole number that is not negative.")
    return given


def _place(given: Any, at: str) -> int:
    return -1 if given == -1 and not isinstance(given, bool) else _count(given, at)


def _places(given: Any, at: str) -> tuple[int, ...]:
    return tuple(_count(value, where) for value, where in _items(given, at))


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "name": _text,
    "forward_flops": _amount,
    "backward_flops": _amount,
    "parameter_bytes": _count,
    "activation_bytes": _count,
    "first": _count,
    "count": _count,
    "value_bytes": _count,
    "bytes": _count,
    "produced": _place,
    "used": _places,
    "differentiable": _flag,
}


def _carried(given: Any, at: str, count: int) -> CarriedValue:
    value = _record(CarriedValue, given, at)
    places = (value.produced, *value.used)
    if list(places) != sorted(set(places)) or places[-1] > count:
        raise PlanError(
            f"{at} goes from sublayer {value.produced} to {value.used}: the places that use it must come after the one "
            f"that makes it, ascending, and not after the last one ({count})."
        )
    return value


def _tied(given: Any, at: str, count: int) -> tuple[int, tuple[str, ...]]:
    pair = _items(given, at)
    if len(pair) != 2:
        raise PlanError(f"{at} has {len(pair)} entries; it must be bytes and a list of places.")
    size = _count(pair[0][0], f"{at}[0]")
    places = tuple(_text(value, where) for value, where in _items(pair[1][0], f"{at}[1]"))
    known = {"before", "after", *map(str, range(count))}
    wrong = [p for p in places if p not in known]
    if wrong or len(set(places)) < 2:
        raise PlanError(
            f"{at} ties {', '.join(places) or 'nothing'}: it needs two places or more, each 'before', 'after' or the "
            f"index of a sublayer (0 to {count - 1}) as text."
        )
    return size, places
