"""One safetensors file that holds tensors and, in its header, text with a checksum."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from attnres_fx.conversion.stored.whole_file import write_whole
from attnres_fx.errors import SaveError

Stored = Callable[[str], Tensor]


def safetensors() -> Any:
    """The safetensors package with its torch part. Raises SaveError where it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise SaveError(f"files need the package safetensors, which cannot be imported: {error}.") from error
    return safetensors


def write_container(target: Any, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write a file, whole or not at all.

    Args:
        target: A path, or a binary file to write to.
        texts: By name; each gets a checksum.
        tensors: On the CPU and contiguous, none of which shares memory with another.

    Raises:
        SaveError: It cannot be written; what was there before is there still.
    """
    torch_part = safetensors().torch
    header = {**texts, **{f"{name}.sha256": text_checksum(text) for name, text in texts.items()}}
    try:
        if hasattr(target, "write"):
            target.write(torch_part.save(dict(tensors), header))
        else:
            write_whole(target, lambda path: torch_part.save_file(dict(tensors), path, header))
    except Exception as error:  # OSError, and safetensors' own
        where = "the file" if hasattr(target, "write") else str(target)
        why = f"{type(error).__name__}: {error}"
        raise SaveError(f"{where} could not be written ({why}); what was there before is there still.") from error


@contextlib.contextmanager
def open_container(source: Any, *names: str) -> Iterator[tuple[dict[str, str], set[str], Stored]]:
    """Open a file that `write_container` wrote.

    Args:
        source: A path, or a binary file to read from.
        names: Of the texts that it must have.

    Yields:
        The texts, the names of the tensors, and a function that reads one of them.

    Raises:
        SaveError: It is no such file, or a text's checksum does not fit.
    """
    package = safetensors()
    if hasattr(source, "read"):
        data = source.read()
        _refuse_older(data[:4], "the file")
        texts = _header(data)
        tensors = package.torch.load(data)
        del data
        yield _checked(texts, names), set(tensors), tensors.__getitem__
        return
    path = Path(source)
    if not path.is_file():
        raise SaveError(f"{os.fspath(source)} is no file.")
    with path.open("rb") as file:
        _refuse_older(file.read(4), os.fspath(source))
    with package.safe_open(path, framework="pt", device="cpu") as opened:
        yield _checked(opened.metadata() or {}, names), set(opened.keys()), opened.get_tensor


@contextlib.contextmanager
def reading(source: Any, writer: str) -> Iterator[None]:
    """Say of whatever is raised inside in which file it was, as a SaveError; `writer` is what writes such files."""
    what = "the file" if hasattr(source, "read") else str(source)
    try:
        yield
    except SaveError as error:
        text = str(error).rstrip(".")
        raise SaveError(f"{text}." if text.startswith(what) else f"{what} cannot be loaded: {text}.") from error
    except Exception as error:  # whatever a part of torch, or of this library, says to what the file holds
        why = f"{type(error).__name__}: {error}"
        raise SaveError(f"{what} was not written by {writer}, or is damaged ({why}).") from error


def _header(data: bytes) -> Any:
    import json

    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size].decode()).get("__metadata__", {})  # of bytes, json would guess the encoding


def _checked(texts: Any, names: tuple[str, ...]) -> dict[str, str]:
    for name in names:
        text = texts.get(name)
        if not isinstance(text, str) or texts.get(f"{name}.sha256") != text_checksum(text):
            raise SaveError(f"its header has no {name!r}, or one whose checksum does not fit: the file is damaged")
    return {name: texts[name] for name in names}


def _refuse_older(start: bytes, what: str) -> None:
    if start[:2] == b"PK":
        raise SaveError(
            f"{what} is a file of torch.save: one that attnres_fx wrote before format 3, or something else. Such files "
            f"can run code when they are read. One of attnres_fx: load it with the version that wrote it, and convert "
            f"the model anew. A state_dict: a converted model takes it by load_state_dict."
        )


def text_checksum(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
