"""What PyTorch prints and warns of while a model is traced is kept for the debug log; errors say it in a few words."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


class _Others:
    """A stream that keeps what one thread writes, and passes on what others do."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()
        self.kept: list[str] = []

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread:
            return int(self._stream.write(text))
        self.kept.append(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quiet_tracer() -> Iterator[None]:
    """Keep what this thread writes to stderr and logs as torch; as it is where TORCH_LOGS asks for logs.

    To be entered under the capture's lock: the stream belongs to the process.
    """
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    before, stream = sys.stderr, _Others(sys.stderr)
    thread = threading.get_ident()
    known = [x for name, x in logging.root.manager.loggerDict.items() if name.split(".")[0] == "torch"]
    handlers = [h for x in known if isinstance(x, logging.Logger) for h in x.handlers]

    def others(record: logging.LogRecord) -> bool:
        if record.thread == thread:
            stream.kept.append(f"{record.getMessage()}\n")
        return record.thread != thread

    for handler in handlers:
        handler.addFilter(others)
    sys.stderr = stream  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.stderr is stream:
            sys.stderr = before
        for handler in handlers:
            handler.removeFilter(others)
        if text := "".join(stream.kept).strip():
            log.debug("while tracing: %s", text)
