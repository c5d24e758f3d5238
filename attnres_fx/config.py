"""`AttnResConfig`: what a conversion does, as one frozen value."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from attnres_fx.errors import ConfigError

Variant = Literal["full", "block", "local"]
Output = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class AttnResConfig:
    """How residual streams are rewritten, as one frozen value.

    Args:
        variant: which sources a read sees. `"full"`: the root and every sublayer output; `"block"`: the root, the sums
            of completed blocks and the current partial sum (the paper's Block AttnRes); `"local"`: one incoming
            summary and this block's sublayer outputs.
        num_blocks: number of blocks, of sizes that differ by at most one, the longer first.
        block_size: sublayers in a block; the last block may be shorter.
        boundaries: the sublayer indices, from 0, at which the blocks after the first begin. At most one of these three
            is given; with none of them a block has ceil(L / 8) of the stream's L sublayers.
        output: `"sum"` multiplies a read by its number of sources, so that a fresh conversion computes what the
            original computed; `"mean"` is the paper's literal form.
        eps: added to the mean square of a source before its root is taken.
        streams: `"main"` (streams not nested in another's sublayer), `"all"`, or stream names.

    Raises:
        ConfigError: A value, or a combination of values, is not allowed.

    Source: arXiv 2603.15031, sections 3.1 and 3.2.
    """

    variant: Variant = "block"
    num_blocks: int | None = None
    block_size: int | None = None
    boundaries: Sequence[int] | None = None
    output: Output = "sum"
    eps: float = 1e-6
    streams: str | Sequence[str] = "main"

    def __post_init__(self) -> None:
        _require_one_of("variant", self.variant, get_args(Variant))
        _require_one_of("output", self.output, get_args(Output))
        given = [n for n in ("num_blocks", "block_size", "boundaries") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"AttnResConfig got {' and '.join(given)}, which each decide the blocks: give one of them."
            )
        if given and self.variant == "full":
            raise ConfigError(
                f"AttnResConfig(variant='full') has no blocks, so {given[0]} means nothing: "
                f"leave it out, or choose variant='block' or 'local'."
            )
        for name in ("num_blocks", "block_size"):
            _require_positive_int(name, getattr(self, name))
        if self.boundaries is not None:
            object.__setattr__(self, "boundaries", _checked_boundaries(self.boundaries))
        if not isinstance(self.eps, int | float) or isinstance(self.eps, bool) or not 0 <= self.eps < math.inf:
            raise ConfigError(f"AttnResConfig.eps must be a finite number that is not negative; it is {self.eps!r}.")
        object.__setattr__(self, "eps", float(self.eps))
        object.__setattr__(self, "streams", _checked_streams(self.streams))


def _require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"AttnResConfig.{name} must be one of {', '.join(allowed)}; it is {value!r}.")


def _require_positive_int(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"AttnResConfig.{name} must be a whole number of at least 1; it is {value!r}.")


def _checked_streams(streams: object) -> str | tuple[str, ...]:
    if isinstance(streams, str):
        return streams
    if isinstance(streams, set | frozenset):  # the order of a set is not the same in every process
        streams = sorted(streams, key=str)
    names = tuple(streams) if isinstance(streams, list | tuple) else ()
    if not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"AttnResConfig.streams must be 'main', 'all' or stream names; it is {streams!r}.")
    return names


def _checked_boundaries(boundaries: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(boundaries, list | tuple | range):
        raise ConfigError(f"AttnResConfig.boundaries must be a list of sublayer indices; it is {boundaries!r}.")
    starts = tuple(boundaries)
    if any(not isinstance(b, int) or isinstance(b, bool) for b in starts):
        raise ConfigError(f"AttnResConfig.boundaries must be sublayer indices; they are {starts!r}.")
    if any(b < 1 for b in starts):
        raise ConfigError(
            f"AttnResConfig.boundaries are where blocks after the first begin, so each is at least 1; "
            f"they are {starts!r}."
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        raise ConfigError(f"AttnResConfig.boundaries must rise; they are {starts!r}.")
    return starts
