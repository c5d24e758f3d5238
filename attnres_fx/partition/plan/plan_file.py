"""The file of a plan: JSON with a format, a version and a checksum, whatever the plan holds."""

import hashlib
import json
from pathlib import Path
from typing import Any

from attnres_fx._version import __version__
from attnres_fx.conversion.stored.whole_file import write_whole
from attnres_fx.errors import PlanError

FORMAT = 2


def write_content(content: dict[str, Any], path: str | Path) -> None:
    """Write plain data with its checksum, whole or not at all. Raises PlanError where the file cannot be written."""
    head = {"format": FORMAT, "version": __version__, "checksum": _checksum(content)}
    text = json.dumps({**head, "plan": content}, indent=1) + "\n"
    try:
        write_whole(path, lambda beside: beside.write_text(text))
    except OSError as error:
        raise PlanError(f"the plan cannot be written to {str(path)!r}: {error}.") from error


def read_content(path: str | Path) -> Any:
    """What `write_content` wrote. Raises PlanError for a file that is cut short, edited, or of another format."""
    if not Path(path).is_file():  # a pipe would be waited for, and a device has no end
        raise PlanError(f"{str(path)!r} is no file: give one that Plan.save wrote.")
    try:
        file = json.loads(Path(path).read_text(encoding="utf-8"))
        head = {name: file[name] for name in ("format", "version", "checksum", "plan")}
        checksum = _checksum(head["plan"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanError(
            f"{str(path)!r} is no plan ({type(error).__name__}: {error}): give a file that Plan.save wrote, whole."
        ) from error
    if head["format"] != FORMAT or _major(head["version"]) != _major(__version__):
        raise PlanError(
            f"{str(path)!r} has format {head['format']!r:.40} of attnres_fx {head['version']!r:.40}; this is {FORMAT} "
            f"of {__version__}: plan again with this version."
        )
    if head["checksum"] != checksum:
        raise PlanError(
            f"{str(path)!r} was changed after it was written: its checksum does not fit. Plan again with other "
            f"options (`starts=`, `config=`) instead of editing the file."
        )
    return head["plan"]


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _major(version: Any) -> str:
    parts = str(version).split(".")
    return ".".join(parts[:2]) if parts[0] == "0" else parts[0]
