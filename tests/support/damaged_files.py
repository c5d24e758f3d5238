"""Saved models that are damaged: bytes flipped or cut, and values changed under checksums that fit."""

import copy
import hashlib
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import attnres_fx as ax

NASTY: list[Any] = [
    0,
    -1,
    10**12,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "os.system",
    "__class__",
    'a"); import os; ("',
    True,
    None,
    [],
    {},
    [-1],
    {"node": "x"},
    {"function": "torch.add"},
]


def saved(model: Any) -> bytes:
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


def outcome(data: bytes) -> str:
    """`"loaded"`, `"SaveError"`, or what else was raised."""
    try:
        ax.load(io.BytesIO(data))
    except ax.errors.SaveError:
        return "SaveError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "loaded"


def described(data: bytes) -> dict[str, Any]:
    """What a file says of its model."""
    size = int.from_bytes(data[:8], "little")
    return dict(json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["about"]))


def with_description(data: bytes, about: Any) -> bytes:
    """The file with another description, and the checksum that fits it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(about)
    header["__metadata__"]["about"] = text
    header["__metadata__"]["about.sha256"] = hashlib.sha256(text.encode()).hexdigest()
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    return len(new).to_bytes(8, "little") + new + data[8 + size :]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in plain data below the root."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def changed(about: Any, path: tuple[Any, ...], change: random.Random) -> tuple[Any, str]:
    """A copy with one value replaced or removed, or one key renamed; and what was done, in words."""
    about = copy.deepcopy(about)
    target = about
    for step in path[:-1]:
        target = target[step]
    kind = change.randrange(5)
    if kind == 0:
        del target[path[-1]]
        return about, f"without {path}"
    if kind == 1 and isinstance(target, dict):
        target[f"{path[-1]}_"] = target.pop(path[-1])
        return about, f"renamed {path}"
    if kind == 2 and isinstance(target[path[-1]], str) and target[path[-1]]:
        text = list(target[path[-1]])
        text[change.randrange(len(text))] = change.choice("x\"'\\. \n(0")
        target[path[-1]] = "".join(text)
    else:
        target[path[-1]] = copy.deepcopy(change.choice(NASTY))
    return about, f"{path} = {target[path[-1]]!r}"
