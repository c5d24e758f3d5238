"""Log of one step on one rank: actions, bytes, and what went wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class HopBytes:
    """Bytes that one rank has sent over one hop, forward and backward."""

    forward: int = 0
    backward: int = 0


@dataclass
class StepLog:
    """Log of one step on one rank.

    Attributes:
        actions: In execution order, as the schedules print them (`"0F1"`: stage 0, forward, microbatch 1).
        sent: Bytes over each hop, named by the stage on its earlier side.
        waiting: Receives that are posted and not yet used: the action that needs it, and from whom it comes.
        failure: The first exception of a stage's own work, with the action it happened in.
    """

    actions: list[str] = field(default_factory=list)
    sent: dict[int, HopBytes] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    failure: tuple[str, Exception] | None = None

    @property
    def failure_text(self) -> str | None:
        """The failure in words; None where there was none."""
        return None if self.failure is None else f"{self.failure[0]}: {cause_of(self.failure[1])}"

    def attempt(self, action: str, work: Callable[[], T]) -> T | None:
        """Result of `work()`; None where it raises, or where earlier work of this rank did.

        A rank whose own work fails goes on sending zeros to its neighbours, so that the step ends on every rank and
        each can say what happened, instead of waiting for a timeout.
        """
        if self.failure is None:
            try:
                return work()
            except Exception as error:
                self.failure = (action, error)
        return None

    def lost_neighbour(self, error: BaseException, *, rank: int, stages: Sequence[int]) -> str:
        """The message after communication broke: what this rank did last and for whom it was waiting."""
        done = self.actions[-1] if self.actions else "nothing"
        waiting = ", ".join(f"{action} (from {source})" for action, source in self.waiting.items())
        own = f" Its own work had failed before: {self.failure_text}." if self.failure_text else ""
        return (
            f"rank {rank} (virtual stages {', '.join(map(str, stages))}) lost a neighbour after {done}, waiting for "
            f"{waiting or 'the end of the step'}: {cause_of(error)}.{own} A process has probably died or is stuck; "
            f"restart the job from the last checkpoint."
        )


def cause_of(error: BaseException) -> str:
    """An exception in one line: the first one, where others were raised from it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
