"""How long a training has to be for a loss, from trainings of several lengths."""

import itertools
import math
from collections.abc import Mapping


def steps_for_loss(losses: Mapping[int, float], wanted: float) -> float:
    """The steps of a whole training, from warm-up to the end of its schedule, that end at a loss.

    Between two lengths the loss is taken to fall as a power of the steps; so it is before the first length and behind
    the last, as between the two lengths that are nearest.

    Args:
        losses: The last loss of each training, by its steps; at least two.
        wanted: The loss to reach.

    Returns:
        Steps; infinity where the loss does not fall from one length to the next.
    """
    pairs = list(itertools.pairwise(sorted(losses)))
    short, long = next((p for p in pairs if losses[p[1]] <= wanted), pairs[-1])
    fall = math.log(losses[short] / losses[long])
    if fall <= 0:
        return math.inf
    return short * math.exp(math.log(long / short) * math.log(losses[short] / wanted) / fall)
