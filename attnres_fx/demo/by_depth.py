"""What depth does to a model's signals, as lists over its sublayers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from attnres_fx.analysis.depth_profile import DepthProfile, profile_depth
from attnres_fx.demo.small_gpt import next_byte_loss
from attnres_fx.demo.text import Text


@dataclass(frozen=True)
class ByDepth:
    """Magnitudes and gradients over the sublayers of a stream.

    Args:
        writes: Root mean square of what each writes.
        states: The same of what the read behind it returns, before its gain: mode "sum" multiplies a mixture by the
            number of its sources, so that the state of an attending model is their mean, as in the paper.
        gradients: Norm of the loss's gradient with respect to what each writes.
        profile: Where they are from.
    """

    writes: list[float]
    states: list[float]
    gradients: list[float]
    profile: DepthProfile


def by_depth(model: nn.Module, text: Text) -> ByDepth:
    """Measure one validation batch.

    Args:
        model: An original or a converted one, in mode "sum".
        text: Whose first validation batch is looked at.

    Returns:
        The lists of its first stream.
    """
    device = next(model.parameters()).device
    ids, targets = (t.to(device) for t in text.validation[0])
    profile = profile_depth(model, (ids,), loss=lambda logits: next_byte_loss(logits, targets))
    stream = profile.streams[0]
    states = []
    for sublayer in stream.sublayers:
        read = stream.read_after(sublayer.index)
        gain = len(read.sources) if read is not None and profile.converted else 1
        states.append(float("nan") if read is None else read.magnitude / gain)
    writes = [float(s.magnitude or 0.0) for s in stream.sublayers]
    return ByDepth(writes, states, [float(s.gradient or 0.0) for s in stream.sublayers], profile)


def growth(values: Sequence[float]) -> float:
    """The mean of the last quarter of the depth over that of the first.

    Args:
        values: Over depth.

    Returns:
        1 where nothing grows.
    """
    quarter = max(1, len(values) // 4)
    return sum(values[-quarter:]) / sum(values[:quarter])


def unevenness(values: Sequence[float]) -> float:
    """The largest over the smallest.

    Args:
        values: Over depth.

    Returns:
        1 where all are alike.
    """
    return max(values) / min(values)
