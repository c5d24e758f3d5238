"""Looks at the depth weights of a model every so many steps, and leaves its training as it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.analysis.depth_weights import DepthWeights, depth_weights
from attnres_fx.analysis.graph_of_call import with_reads
from attnres_fx.analysis.weight_log import ScalarWriter, log_depth_weights
from attnres_fx.backend.attachment import is_attached, unwrapped
from attnres_fx.capture.isolated_run import in_mode
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.errors import ArgumentError, AttachError


class WeightWatch:
    """What the callbacks of both trainers share.

    Attributes:
        history: Step and weights, whenever it looked.
    """

    def __init__(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        every: int = 100,
        to: str | Path | ScalarWriter | None = None,
    ) -> None:
        if every < 1:
            raise ArgumentError(f"every must be a whole number of steps, at least 1; it is {every}.")
        self.args, self.kwargs, self.every, self.to = tuple(args), dict(kwargs or {}), every, to
        self.history: list[tuple[int, DepthWeights]] = []
        self._seen: tuple[nn.Module, ConvertedModel] | None = None

    def look(self, model: nn.Module, step: int, *, writes: bool = True) -> DepthWeights:
        """The weights of a step, in eval mode, kept and written.

        Args:
            model: What is trained, or something around it.
            step: Of the training.
            writes: Whether this process writes; of several, one does.

        Raises:
            AttachError: There is no converted or attached model in it.
        """
        if self.history and self.history[-1][0] == step:
            return self.history[-1][1]
        inner = inner_model(model)
        args, kwargs = _moved((self.args, self.kwargs), inner)
        with in_mode(inner, "eval"):
            weights = depth_weights(self._with_graph(inner, args, kwargs), args, kwargs)
        self.history.append((step, weights))
        if writes and self.to is not None:
            log_depth_weights(weights, step, self.to)
        return weights

    def _with_graph(self, model: nn.Module, args: Any, kwargs: Any) -> ConvertedModel:
        """The model's graph; that of an attached one is captured once, on the tensors that are trained."""
        if self._seen is None or self._seen[0] is not model:
            self._seen = model, with_reads(model, args, kwargs, "DepthWeightsCallback")
        converted = self._seen[1]
        return converted if converted is model else converted.eval()


def inner_model(model: nn.Module) -> nn.Module:
    """The converted or attached model in what a trainer holds. Raises AttachError where there is none."""
    for part in (unwrapped(model), *model.modules()):
        part = unwrapped(part)
        if isinstance(part, ConvertedModel) or is_attached(part):
            return part
    raise AttachError(
        f"there is no converted or attached model in {type(model).__name__}, so there are no depth weights: train what "
        f"attnres_fx.convert returns, or attach the model first."
    )


def _moved(call: Any, model: nn.Module) -> Any:
    """Arguments of a call on the device that a model is on."""
    device = next((p.device for p in model.parameters()), None)
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, call)
