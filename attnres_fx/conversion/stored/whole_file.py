"""Writing a file so that a full disk or a killed process leaves the old one."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a file beside its place, and move it there when all of it is on the disk.

    Args:
        path: Where the file is to be; one that is there stays until the new one is whole.
        write: Called with the path to write to, which is in the same folder.

    Raises:
        OSError: The file cannot be written; nothing of it is left.
        Exception: What `write` raises.
    """
    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {str(place.parent)!r}: make it first")
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        write(beside)
        if place.exists():
            shutil.copymode(place, beside)
        flush_to_disk(beside)
        beside.replace(place)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    flush_folder(place.parent)


def flush_to_disk(path: Path) -> None:
    """Return when a file's contents are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk, where the system can say so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
