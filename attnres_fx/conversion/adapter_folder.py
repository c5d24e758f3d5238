"""The files of an adapter folder, which holds the old adapter or the new one at every moment of a save."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from attnres_fx.conversion.stored.container import write_container
from attnres_fx.conversion.stored.whole_file import flush_folder, flush_to_disk, write_whole
from attnres_fx.errors import SaveError

CONFIG_FILE = "attnres_config.json"
TENSOR_FILE = "attnres.safetensors"


def replace_adapter(place: Path, described: dict[str, Any], text: str, tensors: Mapping[str, Tensor]) -> None:
    """Write both files so that at every moment the folder holds the old adapter or the new one.

    The new tensors wait beside the old ones until the config, which names their checksum, is in its place.
    """
    _finish_cut_short(place)
    part = place / f".{TENSOR_FILE}.{os.getpid()}.part"
    waiting = part
    try:
        write_container(part, {"adapter": text}, tensors)
        flush_to_disk(part)
        checksum = _file_checksum(part)
        waiting = _waiting(place, checksum)
        part.replace(waiting)
        lines = [f" {json.dumps(n)}: {json.dumps(v)}" for n, v in {**described, "checksum": checksum}.items()]
        config = "{\n" + ",\n".join(lines) + "\n}\n"
        write_whole(place / CONFIG_FILE, lambda path: path.write_text(config))
    except BaseException:
        for left in (part, waiting):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        raise
    waiting.replace(place / TENSOR_FILE)
    for stale in place.glob(f"{TENSOR_FILE}.*"):
        stale.unlink(missing_ok=True)
    flush_folder(place)


def _finish_cut_short(place: Path) -> None:
    """Put the tensors of a save that was killed at its end where they belong."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        checksum = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))["checksum"]
        if (waiting := _waiting(place, checksum)).is_file() and _file_checksum(waiting) == checksum:
            waiting.replace(place / TENSOR_FILE)


def _waiting(place: Path, checksum: str) -> Path:
    return place / f"{TENSOR_FILE}.{checksum[:16]}"


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_table(place: Path) -> dict[str, Any]:
    if not (place / CONFIG_FILE).is_file():
        raise SaveError(
            f"{place} holds no adapter: it has no {CONFIG_FILE}, which save_adapter writes, and save_pretrained of a "
            f"converted or attached model."
        )
    described = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(described, dict):
        raise SaveError(f"{CONFIG_FILE} is no table")
    return described


def adapter_tensors(place: Path, checksum: Any) -> Path:
    """The tensors that belong to the config: in their place, or waiting beside it if a save was cut short."""
    if not isinstance(checksum, str) or len(checksum) != 64 or not checksum.isalnum():
        raise SaveError(f"{CONFIG_FILE} has no checksum of {TENSOR_FILE}")
    for path in (place / TENSOR_FILE, _waiting(place, checksum)):
        if path.is_file() and _file_checksum(path) == checksum:
            return path
    raise SaveError(f"{TENSOR_FILE} is missing, damaged, or belongs to another {CONFIG_FILE}: its checksum differs")
