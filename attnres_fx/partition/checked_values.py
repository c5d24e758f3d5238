"""Values that users and files give: of the kind they must be, as plain Python values, or refused by name."""

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

from attnres_fx.errors import PlanError

Kind = TypeVar("Kind")

#: Bytes, operations and places beyond this are no numbers of any model; sums of them must fit machine integers.
LARGEST_COUNT = 2**60


def checked_amount(name: str, value: object, *, positive: bool = False) -> float:
    """A finite number that is not negative, or above 0 where it must be `positive`; numpy's numbers are taken too.

    Raises PlanError with the name and the value.
    """
    number = _as_float(value)
    if not (0 <= number < math.inf) or (positive and number == 0):
        least = "a positive finite number" if positive else "a finite number of at least 0"
        raise PlanError(f"{name} must be {least}; it is {value!r:.80}.")
    return number


def checked_count(name: str, value: object, *, least: int = 0) -> int:
    """A whole number of at least `least`; one that comes as a float (1e9 bytes) is taken too.

    Raises PlanError with the name and the value.
    """
    number = _as_float(value)
    whole = isinstance(value, Integral) or number.is_integer()
    if not number >= least or not whole:
        raise PlanError(f"{name} must be a whole number of at least {least}; it is {value!r:.80}.")
    if number > LARGEST_COUNT:
        raise PlanError(f"{name} must be no more than 2**60; it is {value!r:.80}.")
    return int(value)  # type: ignore[call-overload, no-any-return]


def checked_index(name: str, value: object, *, least: int = 0) -> int:
    """`checked_count` for what counts places: no floats."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise PlanError(f"{name} must be a whole number of at least {least}; it is {value!r:.80}.")
    return checked_count(name, value, least=least)


def checked_text(name: str, value: object) -> str:
    """A string. Raises PlanError with the name and the value."""
    if not isinstance(value, str):
        raise PlanError(f"{name} must be a text; it is {value!r:.80}.")
    return value


def checked_flag(name: str, value: object) -> bool:
    """True or False. Raises PlanError with the name and the value."""
    if not isinstance(value, bool):
        raise PlanError(f"{name} must be true or false; it is {value!r:.80}.")
    return value


def checked_choice(name: str, value: object, choices: Collection[str]) -> str:
    """One of a few names. Raises PlanError with the name and the value."""
    if not isinstance(value, str) or value not in choices:
        raise PlanError(f"{name} must be one of {', '.join(choices)}; it is {value!r:.80}.")
    return value


def checked_items(name: str, value: object) -> tuple[Any, ...]:
    """A tuple, or a list or range as one. Raises PlanError with the name and the value."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise PlanError(f"{name} must be a tuple; it is {value!r:.80}, a {type(value).__name__}.")
    return tuple(value)


def checked_record(name: str, value: object, kind: type[Kind]) -> Kind:
    """An instance of a class. Raises PlanError with the name and what it is instead."""
    if not isinstance(value, kind):
        raise PlanError(f"{name} must be of type {kind.__name__}; it is {value!r:.80}, a {type(value).__name__}.")
    return value


def checked_fields(record: Any, of: str, **checks: Literal["amount", "positive", "count", "index", "flag"]) -> None:
    """Check these fields of a frozen dataclass and write them back as plain Python values.

    of: whose they are, for the error. Raises PlanError that names the first wrong field.
    """
    for field, kind in checks.items():
        name, value = f"{type(record).__name__}.{field}{of}", getattr(record, field)
        plain: object
        if kind == "flag":
            plain = checked_flag(name, value)
        elif kind == "index":
            plain = checked_index(name, value)
        elif kind == "count":
            plain = checked_count(name, value)
        else:
            plain = checked_amount(name, value, positive=kind == "positive")
        object.__setattr__(record, field, plain)


def _as_float(value: object) -> float:
    """NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return -math.inf if isinstance(value, Integral) and int(value) < 0 else math.inf
