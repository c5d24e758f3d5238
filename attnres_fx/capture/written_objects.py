"""Which objects a traced call writes to, and where, as Dynamo notes it."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnres_fx.capture.outside_state import WrittenObject


def written_objects() -> list[WrittenObject]:
    """The objects that were there before the call and that it writes to; for a backend, while it is called.

    Dynamo has no documented way to ask for them. Where this torch does not tell, there are none.
    """
    try:
        effects = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.side_effects
        kept = {id(o): o for o in effects.keepalive}
        tracked = [(kept[i], v) for i, v in effects.id_to_variable.items() if i in kept and _was_there(v)]
        return [
            WrittenObject(value, tuple(effects.store_attr_mutations.get(v, ())), _place(v), _line(effects, v))
            for value, v in tracked
            if not isinstance(value, Tensor) and effects.is_modified(v)
        ]
    except (AttributeError, AssertionError, NotImplementedError):
        return []


def _was_there(variable: Any) -> bool:
    kind = type(variable.mutation_type).__name__
    return variable.source is not None and kind in ("ValueMutationExisting", "AttributeMutationExisting")


def _place(variable: Any) -> str:
    """Dynamo's name of an object as a person would write it."""
    local = getattr(variable, "local_name", None)
    if local is not None:
        return str(local)
    text = str(variable.source.name)
    if "__closure__" in text:
        return "what a function encloses"
    text = re.sub(r"G\['(?:__import_)?([^']+)'\]", lambda m: m.group(1).replace("_dot_", "."), text)
    text = re.sub(r"L\['args'\]\[(\d+)\]", r"argument \1", text)
    text = re.sub(r"L\['kwargs'\]\['([^']+)'\]", r"argument '\1'", text)
    text = re.sub(r"\.?_modules\['([^']+)'\]", r".\1", text.replace(".__dict__['_modules']", "._modules"))
    return re.sub(r"L\['module'\]\.?", "", text).replace("type()", "the class") or "the model"


def _line(effects: Any, variable: Any) -> str:
    """The line of the caller's source that writes, in brackets; empty where it is not known."""
    for stack in getattr(effects, "mutation_user_stacks", {}).get(variable, ()):
        for frame in reversed(stack):
            if not frame.filename.startswith(str(Path(torch.__file__).parent)):
                return f" ({Path(frame.filename).name}:{frame.lineno}: {(frame.line or '').strip()[:80]})"
    return ""
