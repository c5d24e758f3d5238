"""`HyperConnectionsConfig`: streams carried as several copies, as one frozen value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnres_fx.config import RewriteConfig, checked_streams
from attnres_fx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HyperConnectionsConfig(RewriteConfig):
    """How residual streams are carried by hyper-connections, as one frozen value.

    A stream becomes several copies of itself. A read is a weighted sum of the copies; a sublayer's output is added to
    each copy with a weight of its own, after the copies were mixed with one another. A fresh conversion computes what
    the original computed: all copies are equal then, and the weights of a read sum to one.

    Args:
        copies: n, how many copies a stream has; at least 1, and 2 with `constrained`.
        constrained: manifold-constrained hyper-connections: the matrix that mixes the copies is doubly stochastic
            (Sinkhorn), the weights of a read are between 0 and 1 and those of a write between 0 and 2, all of them
            computed from the copies together. False: hyper-connections as they were first published, without bounds,
            each copy's weights from that copy.
        dynamic: whether the weights depend on the token, beside a part that does not.
        sinkhorn_steps: how often columns and rows are normalised; nothing where not `constrained`.
        eps: added to the mean square of what the dynamic weights are computed from.
        streams: `"main"` (streams not nested in another's sublayer), `"all"`, or stream names.

    Raises:
        ConfigError: A value, or a combination of values, is not allowed.

    Source: arXiv 2409.19606 (hyper-connections) and arXiv 2512.24880 (constrained).
    """

    copies: int = 4
    constrained: bool = True
    dynamic: bool = True
    sinkhorn_steps: int = 20
    eps: float = 1e-6
    streams: str | Sequence[str] = "main"

    of_function: ClassVar[tuple[str, ...]] = ("copies", "constrained", "dynamic", "sinkhorn_steps", "eps")
    always_shown: ClassVar[tuple[str, ...]] = ("copies", "constrained")

    def __post_init__(self) -> None:
        for name in ("constrained", "dynamic"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name))
        least = 2 if self.constrained else 1
        if not _is_whole(self.copies) or self.copies < least:
            raise _wrong("copies", f"a whole number of at least {least} (constrained={self.constrained})", self.copies)
        if not _is_whole(self.sinkhorn_steps) or self.sinkhorn_steps < 1:
            raise _wrong("sinkhorn_steps", "a whole number of at least 1", self.sinkhorn_steps)
        if not isinstance(self.eps, int | float) or isinstance(self.eps, bool) or not 0 <= self.eps < math.inf:
            raise _wrong("eps", "a finite number that is not negative", self.eps)
        object.__setattr__(self, "eps", float(self.eps))
        object.__setattr__(self, "streams", checked_streams("HyperConnectionsConfig", self.streams))

    @property
    def does(self) -> str:
        """What becomes of the streams, after "2 streams"."""
        return f"carried by hyper-connections in {self.copies} copies"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, wanted: str, value: object) -> ConfigError:
    return ConfigError(f"HyperConnectionsConfig.{name} must be {wanted}; it is {value!r}.")
