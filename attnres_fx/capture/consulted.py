"""What a model's code asks of a call that changes no value: whether gradients are on, and how tensors lie in memory."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from attnres_fx.capture.assumed import GlobalValue, HeldValue
from attnres_fx.capture.guard_places import Guarded, steps_of
from attnres_fx.capture.held_values import UNKNOWN, value_at

#: What a model may ask.
GRADIENTS, CONTIGUOUS, STRIDES = "gradients", "contiguous", "strides"
#: Where Dynamo answers it; no documented way says that it did.
_ANSWERS = {
    "method_attr_requires_grad": GRADIENTS,
    "method_attr_grad_fn": GRADIENTS,
    "method_attr_is_leaf": GRADIENTS,
    "method_is_contiguous": CONTIGUOUS,
    "method_stride": STRIDES,
}
#: Kinds of guards that say that a plain value became part of a graph.
_VALUE_GUARDS = ("CONSTANT_MATCH", "EQUALS_MATCH", "SEQUENCE_LENGTH", "DICT_LENGTH", "BOOL_MATCH", "NONE_MATCH")
_TORCH = str(Path(torch.__file__).parent)
_ARGUMENT = re.compile(r"(args|kwargs)(\[.*)$")
_GLOBAL = re.compile(r"G\['__import_([^']+)'\](.*)$")


def traced_code() -> tuple[CodeType, ...]:
    """The code that Dynamo is tracing; for a backend, while it is called. Empty where this torch does not tell."""
    told = getattr(torch._dynamo.utils, "get_traced_code", lambda: None)()
    return tuple(dict.fromkeys(told or ()))


@contextlib.contextmanager
def noted_questions() -> Iterator[set[str]]:
    """What the code that Dynamo traces meanwhile asks, torch's own code aside."""
    asked: set[str] = set()
    tensors, functions = (
        getattr(torch._dynamo.variables, name, None) for name in ("TensorVariable", "TorchInGraphFunctionVariable")
    )

    def noted(original: Callable[..., Any], question: str, about: Any = None) -> Callable[..., Any]:
        def answer(variable: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
            known = about is None or getattr(variable, "value", None) is about
            if known and not tx.f_code.co_filename.startswith(_TORCH):
                asked.add(question)
            return original(variable, tx, *args, **kwargs)

        return answer

    places: list[tuple[Any, str, str, Any]] = [(tensors, name, q, None) for name, q in _ANSWERS.items()]
    places.append((functions, "call_function", GRADIENTS, torch.is_grad_enabled))
    there = [(owner, name, q, about) for owner, name, q, about in places if name in getattr(owner, "__dict__", {})]
    originals = [owner.__dict__[name] for owner, name, _, _ in there]
    try:
        for (owner, name, question, about), original in zip(there, originals, strict=True):
            setattr(owner, name, noted(original, question, about))
        yield asked
    finally:
        for (owner, name, _, _), original in zip(there, originals, strict=True):
            setattr(owner, name, original)


def custom_functions(codes: Iterable[CodeType]) -> bool:
    """Whether a custom `autograd.Function` was traced; on tensors without gradients its backward leaves no trace."""
    traced = set(codes)
    return any(getattr(f.__dict__.get("forward"), "__func__", f).__code__ in traced for f in _functions() if _own(f))


def _own(function: Any) -> bool:
    return hasattr(getattr(function.__dict__.get("forward"), "__func__", None), "__code__")


def _functions(base: Any = torch.autograd.Function) -> Iterator[Any]:
    for kind in base.__subclasses__():
        yield kind
        yield from _functions(kind)


def global_values(guards: Iterable[Guarded]) -> tuple[GlobalValue, ...]:
    """The plain values of Python modules, torch's own aside, that a trace took for granted.

    Args:
        guards: As they were recorded.
    """
    found: dict[tuple[str, tuple[Any, ...]], GlobalValue] = {}
    for guard in guards:
        match = _GLOBAL.match(guard.source)
        if match is None or guard.kind not in _VALUE_GUARDS:
            continue
        module, steps = match.group(1).replace("_dot_", "."), steps_of(match.group(2))
        if not steps or module.split(".")[0] == "torch" or "torch" in steps:
            continue
        value = value_at(sys.modules.get(module), steps)
        if value is not UNKNOWN:
            found[module, tuple(steps)] = GlobalValue(module, tuple(steps), value)
    return tuple(found.values())


def values_of_classes(root: nn.Module, guards: Iterable[Guarded]) -> tuple[HeldValue, ...]:
    """The plain values of classes and closures, torch's own aside, that a trace took for granted.

    Args:
        root: The traced tree.
        guards: As they were recorded.
    """
    found: dict[tuple[int, str], HeldValue] = {}
    for guard in guards:
        before, _, name = guard.source.rpartition(".")
        if (
            guard.kind not in _VALUE_GUARDS
            or not name.isidentifier()
            or not ("type(" in before or "__closure__" in before)
        ):
            continue
        try:
            holder = eval(before, {"module": root})  # an expression that Dynamo wrote
        except Exception:  # Dynamo has functions of its own in some
            continue
        module = getattr(holder, "__module__", None) or ""
        value = value_at(holder, (name,))
        if not isinstance(holder, nn.Module) and module.split(".")[0] != "torch" and value is not UNKNOWN:
            place = f"{getattr(holder, '__name__', 'a closure')}.{name}"
            found[id(holder), name] = HeldValue(holder, (name,), value, place)
    return tuple(found.values())


def values_of_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], guards: Iterable[Guarded]
) -> tuple[HeldValue, ...]:
    """The plain values of objects among the arguments that a trace took for granted.

    Args:
        args: By position.
        kwargs: By keyword.
        guards: As they were recorded.
    """
    found: dict[str, HeldValue] = {}
    for guard in guards:
        match = _ARGUMENT.match(guard.source) if guard.kind in _VALUE_GUARDS else None
        steps = steps_of(match.group(2)) if match is not None else None
        holder: Any = args if match is not None and match.group(1) == "args" else kwargs
        while steps and isinstance(holder, list | tuple | dict):
            holder, *steps = holder[steps[0]], *steps[1:]
        value = value_at(holder, steps) if steps and not isinstance(holder, torch.Tensor | nn.Module) else UNKNOWN
        if value is not UNKNOWN:
            place = f"{'.'.join(map(str, steps or ()))} of the argument of type {type(holder).__name__}"
            found[guard.source] = HeldValue(holder, tuple(steps or ()), value, place)
    return tuple(found.values())


def environment_read(codes: Iterable[CodeType]) -> tuple[HeldValue, ...]:
    """The environment of the process, where the traced code looked at it; which variables of it is not known."""
    reads = type(os.environ).__getitem__.__code__ in set(codes)
    held = HeldValue(os.environ, ("_data",), value_at(os.environ, ("_data",)), "the environment (os.environ)")
    return (held,) if reads else ()
