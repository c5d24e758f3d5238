"""The calls that made a node, outermost first, and whose code each of them is."""

import linecache
import re
import site
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_OWN = str(Path(__file__).parents[2])
_TRACER = f"{_OWN}/capture/"
_TORCH = str(Path(torch.__file__).parent)
_INSTALLED = tuple({*site.getsitepackages(), *map(sysconfig.get_path, ("purelib", "platlib", "stdlib"))})

#: Whose code a file is: the tracer's and ours, an installed package's, the user's own.
TOOLS, PACKAGE, USER = range(3)


@dataclass(frozen=True)
class Frame:
    """A line that was running when a node was made.

    Args:
        file: The file's path.
        line: Its number in the file.
        function: The name of the function it is in.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def in_same_function(self, other: "Frame") -> bool:
        """Whether both are lines of one function; two of one name in a file begin in different places."""
        if (self.file, self.function) != (other.file, other.function):
            return False
        return _begins(self.file, self.line, self.function) == _begins(other.file, other.line, other.function)


def frames_of(node: Node) -> tuple[Frame, ...]:
    """The frames of a node's stack, without the tracer's where there are others; none where the tracer kept none."""
    return _frames(node.meta.get("stack_trace") or "")


@lru_cache(maxsize=4096)
def _frames(stack: str) -> tuple[Frame, ...]:
    found = tuple(Frame(file, int(line), function) for file, line, function in _FRAME.findall(stack))
    found = tuple(f for f in found if not f.file.startswith(_TRACER))  # a plain Sequential's stack holds nothing else
    return of_owner(found, PACKAGE) or found


def of_owner(frames: Sequence[Frame], owner: int) -> tuple[Frame, ...]:
    """The frames of this owner and of those nearer to the user."""
    return tuple(f for f in frames if owner_of(f.file) >= owner)


@lru_cache(maxsize=1024)
def owner_of(file: str) -> int:
    """Whose code a file is: `TOOLS`, `PACKAGE` or `USER`."""
    if file.startswith((f"{_OWN}/", f"{_TORCH}/", "<")):
        return TOOLS
    return PACKAGE if file.startswith(tuple(f"{folder}/" for folder in _INSTALLED)) else USER


def owner_of_class(kind: object) -> int | None:
    """Whose code a class is, given itself or its dotted name; None where that is not known."""
    name = kind.__module__ if isinstance(kind, type) else str(kind).rpartition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    return owner_of(file) if file else None


@lru_cache(maxsize=4096)
def _begins(file: str, line: int, function: str) -> int:
    """The line on which the function around a line begins; 0 where the source is not at hand."""
    lines = linecache.getlines(file)
    begins = re.compile(rf"\s*(async\s+)?def\s+{re.escape(function)}\b")
    return next((i for i in range(min(line, len(lines)), 0, -1) if begins.match(lines[i - 1])), 0)
