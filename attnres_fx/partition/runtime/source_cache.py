"""Source cache of one rank: values of a microbatch by name, and their gradients as far as they are known.

A rank gives a value that it has received or made to each of its later virtual stages. Each of them takes it as an input
and so returns a gradient for it. The sum of those gradients waits here until the stage that brought the value to this
rank runs its backward: then it goes into the stage that made the value, or back to the rank that sent it.
"""

from collections.abc import Iterable

from torch import Tensor

from attnres_fx.errors import PipelineError


class SourceCache:
    """Values and gradients of the microbatches in flight on one rank. No communication, no autograd."""

    def __init__(self) -> None:
        self._values: dict[int, dict[str, Tensor]] = {}
        self._grads: dict[int, dict[str, Tensor]] = {}
        self._bytes = 0
        self.peak_bytes = 0

    def __len__(self) -> int:
        """Number of values and gradients."""
        return sum(len(tensors) for tensors in (*self._values.values(), *self._grads.values()))

    @property
    def bytes(self) -> int:
        """Bytes of the values, each counted in full."""
        return self._bytes

    def put(self, microbatch: int, name: str, value: Tensor) -> None:
        """Store a value, detached from the graph that made it."""
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

    def accumulate_grad(self, microbatch: int, name: str, grad: Tensor) -> None:
        """Add to the gradient of a value; sums are made in the order of the calls and change no argument."""
        value = self.value(microbatch, name)
        if grad.shape != value.shape:
            raise PipelineError(
                f"the gradient of value {name!r} has shape {tuple(grad.shape)}, its value {tuple(value.shape)}."
            )
        grads = self._grads.setdefault(microbatch, {})
        grads[name] = grads[name] + grad if name in grads else grad

    def grad(self, microbatch: int, name: str) -> Tensor | None:
        """The accumulated gradient of a value; None where there is none yet."""
        return self._grads.get(microbatch, {}).get(name)

    def drop(self, microbatch: int, names: Iterable[str]) -> None:
        """Release values and their gradients; names that are not here are ignored."""
        names = tuple(names)
        for store in (self._values, self._grads):
            tensors = store.get(microbatch, {})
            for name in names:
                tensor = tensors.pop(name, None)
                if store is self._values and tensor is not None:
                    self._bytes -= tensor.nbytes
            if not tensors:
                store.pop(microbatch, None)

    def finish(self, microbatch: int) -> None:
        """Release everything of a microbatch."""
        self.drop(microbatch, (*self._values.get(microbatch, ()), *self._grads.get(microbatch, ())))

    def clear(self) -> None:
        """Release everything, whatever state a step was left in."""
        self._values.clear()
        self._grads.clear()
        self._bytes = 0
