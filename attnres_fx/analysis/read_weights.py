"""Attention over depth of one read, as data."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_fx.shown import brief


@dataclass(frozen=True)
class ReadWeights:
    """Attention over depth of one read.

    Attributes:
        name: Of the read.
        stream: The residual stream it belongs to.
        sources: What each weight is on, oldest first: `v_0` (the root), `v_i` (sublayer i), `b_n` (block n),
            `b_n[:i]` (its first i sublayers), `c_n` (what block n receives).
        weights: [S], averaged over tokens and heads, or [S, ...] per token, with heads [S, ..., H]; they sum to one
            over S.
        back: [S]: how many sublayers were written after each source; of a block, the mean over its sublayers.
    """

    name: str
    stream: str
    sources: tuple[str, ...]
    weights: Tensor
    back: tuple[float, ...]

    def mean(self) -> list[float]:
        """[S]: the weights, averaged over tokens."""
        weights = self.weights
        return (weights.flatten(1).mean(1) if weights.dim() > 1 else weights).tolist()

    @property
    def entropy(self) -> float:
        """Nats of the weights: log(S) where they are even, 0 where one source has all; per token if they are."""
        weights = self.weights.flatten(1) if self.weights.dim() > 1 else self.weights[:, None]
        return float(torch.special.entr(weights).sum(0).mean())

    @property
    def reach(self) -> float:
        """How many sublayers back the read looks, on average."""
        return math.fsum(w * b for w, b in zip(self.mean(), self.back, strict=True))

    @property
    def newest(self) -> float:
        """Locality: the weight on the source that was written last."""
        return self.mean()[self._newest]

    @property
    def jump(self) -> int | None:
        """A long jump: index of the source with most weight, where that is further back than an even read looks."""
        weights = self.mean()
        most = max(range(len(weights)), key=weights.__getitem__)
        if math.isclose(weights[most], min(weights), rel_tol=1e-3):  # all alike but for rounding
            return None
        return most if self.back[most] > self.even_reach else None

    @property
    def even_reach(self) -> float:
        """The reach it would have if its weights were all alike."""
        return math.fsum(self.back) / len(self.back)

    @property
    def _newest(self) -> int:
        return min(range(len(self.back)), key=self.back.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON.

        Returns:
            `read`, `stream`, `sources`, `weights` ([S], or nested lists per token), `back`, `entropy`, `reach` and
            `newest`.
        """
        return {
            "read": self.name,
            "stream": self.stream,
            "sources": list(self.sources),
            "weights": self.weights.tolist(),
            "back": list(self.back),
            "entropy": self.entropy,
            "reach": self.reach,
            "newest": self.newest,
        }

    def __repr__(self) -> str:
        shown = ", ".join(f"{s} {w:.2f}" for s, w in zip(self.sources, self.mean(), strict=True))
        return brief(f"ReadWeights({self.name!r}, [{', '.join(map(str, self.weights.shape))}]: {shown})", length=1_000)


def column(source: str) -> str:
    """The column of a source in a picture: a partial sum shares that of its block."""
    return source.split("[")[0]


def layer_of(read: str) -> str:
    """The layer that a read is in: its path as far as the last number in it; empty where there is none."""
    steps = read.split(".")
    numbers = [i for i, step in enumerate(steps) if step.isdigit()]
    return ".".join(steps[: numbers[-1] + 1]) if numbers else ""
