"""Log of the graphs that the backend has compiled, one for each description of an attachment.

Dynamo hands the backend that description and not the model. The attachments hold their logs, so that a log is released
with the last model that was attached alike.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompiledGraph:
    """One graph that the backend compiled.

    Attributes:
        mode: `"train"`, `"eval"`, or `""` where no node tells.
        grad: Whether gradients were on.
        inputs: Shapes of the tensors it takes that are no parameters.
        reads: Number of reads of the attachment, all of which were matched.
        changed: Passes that changed something, each with the number of operations it took out and put in.
        inner: The compiler that the graph was handed to.
        kernels: Implementations of the reads, by name.
    """

    mode: str
    grad: bool
    inputs: tuple[str, ...]
    reads: int
    changed: tuple[str, ...]
    inner: str
    kernels: str


@dataclass(eq=False)
class CompileLog:
    """Graphs compiled for models that are attached alike. Copies and pickles of a model share it.

    Attributes:
        about: The attachment, as text.
        graphs: In the order in which they were compiled.
    """

    about: str
    graphs: list[CompiledGraph] = field(default_factory=list)

    def __reduce__(self) -> Any:
        return compile_log, (self.about,)


_LOGS: "weakref.WeakValueDictionary[str, CompileLog]" = weakref.WeakValueDictionary()


def compile_log(about: str) -> CompileLog:
    """The log of the attachment with this description. It lives as long as somebody holds it."""
    return _LOGS.setdefault(about, CompileLog(about))
