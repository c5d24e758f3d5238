"""The call that a model is captured from."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from attnres_fx.capture.free_sizes import with_two_rows


@dataclass(frozen=True)
class ExampleCall:
    """A model, and the arguments it is traced with.

    Attributes:
        model: The model; a capture leaves it as it is.
        args: By position.
        kwargs: By keyword.
        dynamic_shapes: Which sizes are free, as `torch.export.export` takes it; None where the capture may choose.
        as_called: Whether the sizes of 1 are what is wanted, as those of a call that fitted no program.
        python_runs: Whether the model's own Python runs at every call, so that what it changes there is no concern of
            the graph's.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any = None
    as_called: bool = False
    python_runs: bool = False

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    @property
    def leaves(self) -> list[Any]:
        """The flat arguments."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def to_trace(self) -> "ExampleCall":
        """The call as it is traced: with two rows in the place of a batch of one, where the capture may choose."""
        if self.dynamic_shapes is not None or self.as_called:
            return self
        args, kwargs = with_two_rows(self.args, self.kwargs)
        return replace(self, args=args, kwargs=kwargs)
