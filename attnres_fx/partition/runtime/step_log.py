"""What one rank did in a step, and how it says that something went wrong."""

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
    """What one rank did in a step.

    actions: in execution order, as the schedules print them (`"0F1"`: stage 0, forward, microbatch 1). sent: bytes
    over each hop, named by the stage on its earlier side. waiting: receives that are posted and not yet used.
    failure: the first exception of a stage's own work, with the action it happened in.
    """

    actions: list[str] = field(default_factory=list)
    sent: dict[int, HopBytes] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    failure: tuple[str, Exception] | None = None

    @property
    def told(self) -> str | None:
        """The failure in words."""
        return None if self.failure is None else f"{self.failure[0]}: {cause_of(self.failure[1])}"

    def attempt(self, action: str, work: Callable[[], T]) -> T | None:
        """Result of some work of this rank; None where it raised, or where an earlier one did.

        A rank whose own work fails goes on handing zeros to its neighbours, so that the step comes to its end
        everywhere and every rank can say what happened, instead of waiting for a timeout.
        """
        if self.failure is None:
            try:
                return work()
            except Exception as error:
                self.failure = (action, error)
        return None

    def lost(self, error: BaseException, *, rank: int, stages: Sequence[int]) -> str:
        """What to say when communication broke: where this rank stood and whom it was waiting for."""
        done = self.actions[-1] if self.actions else "nothing"
        waiting = ", ".join(f"{action} (from {source})" for action, source in self.waiting.items())
        own = f" Its own work had failed before: {self.told}." if self.told else ""
        return (
            f"rank {rank} (virtual stages {', '.join(map(str, stages))}) lost a neighbour after {done}, waiting for "
            f"{waiting or 'the end of the step'}: {cause_of(error)}.{own} A process has probably died or is stuck; "
            f"restart the job from the last checkpoint."
        )


def cause_of(error: BaseException) -> str:
    """An exception in one line: what it was before others were raised from it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
