"""Finished runs in a JSON file: they are kept, and not run again."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import attnres_fx as ax

FOLDER = Path(__file__).parents[1] / "results"


class Results:
    """The runs of one study at one size.

    Args:
        folder: Where the file is, or will be after the first run.
        study: Name of the study.
        size: Name of the size.
    """

    def __init__(self, folder: Path, study: str, size: str) -> None:
        self.path = folder / f"{study}-{size}.json"
        self.data: dict[str, Any] = {"study": study, "size": size, "runs": {}}
        if self.path.is_file():
            self.data = json.loads(self.path.read_text())

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Finished runs by key, in the order in which they finished."""
        return self.data["runs"]

    @property
    def size(self) -> str:
        """Name of the size."""
        return str(self.data["size"])

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep a finished run, with where and when it was made. An interrupted write leaves the file as it was.

        Args:
            key: Of the run.
            record: What it found, as plain data.
        """
        self.runs[key] = record | {"made": provenance()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1) + "\n")
        new.replace(self.path)


def provenance() -> dict[str, Any]:
    """Machine, versions, date and commit.

    Returns:
        Plain data; the commit is None outside of a git checkout, and ends in "+" where files were changed.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "attnres_fx": ax.__version__,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "numpy": version("numpy"),
    }


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(FOLDER.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
