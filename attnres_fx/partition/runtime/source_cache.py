"""What one rank keeps of a microbatch: values by name, and the gradients that have come back for them so far.

A rank hands a value it has received or made to every later virtual stage of its own, which takes it as an input and
so returns a gradient for it. Those gradients wait here until the stage that brought the value to this rank runs its
backward: there they go on, into the stage that made the value or back over the hop it came by.
"""

from collections.abc import Iterable

from torch import Tensor

from attnres_fx.errors import PipelineError


class SourceCache:
    """Values and banked gradients of the microbatches in flight on one rank. No communication, no autograd."""

    def __init__(self) -> None:
        self._values: dict[int, dict[str, Tensor]] = {}
        self._gradients: dict[int, dict[str, Tensor]] = {}
        self._bytes = 0
        self.peak_bytes = 0

    def __len__(self) -> int:
        """Values and gradients held."""
        return sum(len(held) for held in (*self._values.values(), *self._gradients.values()))

    @property
    def bytes(self) -> int:
        """Bytes of the values held, each counted in full."""
        return self._bytes

    def put(self, microbatch: int, name: str, value: Tensor) -> None:
        """Keep a value, cut off from the graph that made it."""
        values = self._values.setdefault(microbatch, {})
        if name in values:
            raise PipelineError(
                f"value {name!r} of microbatch {microbatch} has come to this rank twice: a rank keeps what it has "
                f"received or made. Build the stages again from the plan."
            )
        values[name] = value.detach()
        self._bytes += value.nbytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def value(self, microbatch: int, name: str) -> Tensor:
        """The value of that name, detached; it shares memory with what was put in."""
        try:
            return self._values[microbatch][name]
        except KeyError:
            raise PipelineError(
                f"value {name!r} of microbatch {microbatch} is not on this rank: it was neither received nor made "
                f"here, or its microbatch is done. Build the stages again from the plan."
            ) from None

    def bank(self, microbatch: int, name: str, gradient: Tensor) -> None:
        """Add to the gradient of a value; sums are made in the order of the calls and change no tensor given."""
        value = self.value(microbatch, name)
        if gradient.shape != value.shape:
            raise PipelineError(
                f"the gradient of value {name!r} has shape {tuple(gradient.shape)}, its value {tuple(value.shape)}."
            )
        gradients = self._gradients.setdefault(microbatch, {})
        gradients[name] = gradients[name] + gradient if name in gradients else gradient

    def gradient(self, microbatch: int, name: str) -> Tensor | None:
        """Sum of what was banked for a value; None where nothing was."""
        return self._gradients.get(microbatch, {}).get(name)

    def drop(self, microbatch: int, names: Iterable[str]) -> None:
        """Let go of values and their gradients; what is not here is passed over."""
        for held in (self._values, self._gradients):
            kept = held.get(microbatch, {})
            for name in tuple(names):
                gone = kept.pop(name, None)
                if held is self._values and gone is not None:
                    self._bytes -= gone.nbytes
            if not kept:
                held.pop(microbatch, None)

    def finish(self, microbatch: int) -> None:
        """Let go of everything of a microbatch."""
        self.drop(microbatch, (*self._values.get(microbatch, ()), *self._gradients.get(microbatch, ())))

    def clear(self) -> None:
        """Let go of everything, whatever state a step was left in."""
        self._values.clear()
        self._gradients.clear()
        self._bytes = 0
