"""What the writes of a random program add to a stream, as explicit terms: masks and sums, no slices or joins."""

import torch
from torch import Tensor

from tests.support.brute_force_states import Terms

_MERGES = {"h + e": (1.0, 1.0), "e + h": (1.0, 1.0), "halves": (0.5, 0.5), "lerp": (0.75, 0.25)}


def merge_weights(how: str) -> tuple[float, float]:
    """What a way of merging multiplies the current state and the earlier one by."""
    return _MERGES.get(how, (1.0, -0.5))


def merged_terms(left: Terms, a: float, right: Terms, b: float) -> Terms:
    """`a * left + b * right`, term by term, in float64 as the states are."""
    total = {number: a * term.double() for number, term in left}
    for number, term in right:
        total[number] = total.get(number, 0.0) + b * term.double()
    return sorted(total.items(), key=lambda item: item[0])


def spread_term(how: str, v: Tensor, shape: torch.Size) -> Tensor:
    """The mean of a branch over all rows, or over the tokens, in every row."""
    mean = v.flatten(0, -2).mean(0) if how == "mean of all" else v.mean(-2, keepdim=True)
    return mean.expand(shape)


def rows_term(how: str, v: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """What is written into some rows, zero in the others; and one where a row of the state stays, zero elsewhere."""
    rows = torch.zeros(shape[0], *(1,) * (len(shape) - 1), dtype=v.dtype)
    if how == "cat of what the rows read":
        v = torch.cat([torch.zeros_like(v[:1]), v])
        rows[1:] = 1.0
    elif how in ("index_add", "index_copy", "index_put", "scatter_add"):
        rows[1] = 1.0
    elif how.endswith("in the place"):
        rows[0] = 1.0
    elif how == "cat of two sums":
        rows[:] = 1.0
        rows[0] = -1.0
    else:
        rows[1:] = 1.0
    return v * rows, 1.0 - rows.abs()
