"""A line at a terminal that says what takes so long."""

import sys
import threading
from types import TracebackType
from typing import Self

#: Seconds in which nothing is said.
PATIENCE = 2.0


class Progress:
    """Says on standard error, where that is a terminal, what is being done once it takes longer than PATIENCE.

    Args:
        what: What is worked on.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.doing = ""
        self.late = False
        self._lock = threading.Lock()
        self._timer = threading.Timer(PATIENCE, self._speak)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty():
            self._timer.start()
        return self

    def step(self, doing: str) -> None:
        """Say what is done from now on."""
        with self._lock:
            self.doing = doing
            if self.late:
                self._print()

    def _speak(self) -> None:
        with self._lock:
            self.late = True
            self._print()

    def _print(self) -> None:
        print(f"attnres_fx: {self.what}: {self.doing} …", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._timer.cancel()
        with self._lock:
            self.late = False
