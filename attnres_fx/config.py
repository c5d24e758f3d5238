"""What a conversion does, as one frozen value: `AttnResConfig`, and what every such value says of itself."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

from attnres_fx.errors import ConfigError

Variant = Literal["full", "block", "local"]
Output = Literal["sum", "mean"]


#: Under what files and states name the class of a config.
CONFIG_CLASS = "topology"


class RewriteConfig:
    """What residual streams become: the base of `AttnResConfig` and of the configs of other topologies.

    A subclass is a frozen dataclass. It is known by its name, in files and in states.

    Attributes:
        streams: Which streams are rewritten.
        of_function: The names of the options that decide what the same parameters compute, blocks and streams aside.
        always_shown: The names of the options that are shown also where they are the defaults.
    """

    streams: str | Sequence[str]
    of_function: ClassVar[tuple[str, ...]] = ()
    always_shown: ClassVar[tuple[str, ...]] = ()
    #: How the parameters are that a conversion starts with.
    at_start: ClassVar[str] = "as converted"
    _kinds: ClassVar[dict[str, type["RewriteConfig"]]] = {}

    def __init_subclass__(cls) -> None:
        RewriteConfig._kinds[cls.__name__] = cls

    @property
    def keeps_function(self) -> bool:
        """Whether a fresh conversion computes what the original computed."""
        return True

    @property
    def does(self) -> str:
        """What becomes of the streams, after "2 streams"."""
        return f"rewritten with {type(self).__name__}"

    @property
    def summary(self) -> str:
        """The options that matter most, in a few words."""
        return ", ".join(f"{name} {getattr(self, name)}" for name in self.always_shown)

    def to_data(self) -> dict[str, Any]:
        """The options by name, and the class where it is not `AttnResConfig`."""
        assert dataclasses.is_dataclass(self)
        kind = {} if type(self) is AttnResConfig else {CONFIG_CLASS: type(self).__name__}
        return {**kind, **dataclasses.asdict(self)}

    @staticmethod
    def class_in(data: Mapping[str, Any]) -> type["RewriteConfig"]:
        """The class of what `to_data` returned.

        Args:
            data: The options, and others perhaps.

        Raises:
            ConfigError: It is not known here.
        """
        kind = data.get(CONFIG_CLASS, "AttnResConfig")
        if kind not in RewriteConfig._kinds:
            raise ConfigError(
                f"the config is a {kind!r:.80}, and this process knows {', '.join(sorted(RewriteConfig._kinds))}: "
                f"import the topology that it belongs to first."
            )
        return RewriteConfig._kinds[kind]

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """A config of this class from what `to_data` returned, a list in place of a tuple where JSON made one."""
        return cls(**{name: value for name, value in data.items() if name != CONFIG_CLASS})


@dataclass(frozen=True, kw_only=True)
class AttnResConfig(RewriteConfig):
    """How residual streams are read by attention over depth, as one frozen value.

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

    of_function: ClassVar[tuple[str, ...]] = ("variant", "output", "eps")
    always_shown: ClassVar[tuple[str, ...]] = ("variant", "output")
    at_start: ClassVar[str] = "at zero queries"

    @property
    def keeps_function(self) -> bool:
        """Whether a fresh conversion computes what the original computed: with output `"sum"`."""
        return self.output == "sum"

    @property
    def does(self) -> str:
        """What becomes of the streams, after "2 streams"."""
        return "read by attention over depth"

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
        object.__setattr__(self, "streams", checked_streams("AttnResConfig", self.streams))


def _require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"AttnResConfig.{name} must be one of {', '.join(allowed)}; it is {value!r}.")


def _require_positive_int(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"AttnResConfig.{name} must be a whole number of at least 1; it is {value!r}.")


def checked_streams(kind: str, streams: object) -> str | tuple[str, ...]:
    """The option `streams` of a config, names in a tuple.

    Args:
        kind: The class of the config, for the error.
        streams: What was given.

    Raises:
        ConfigError: It is neither a text nor a list of names.
    """
    if isinstance(streams, str):
        return streams
    if isinstance(streams, set | frozenset):  # the order of a set is not the same in every process
        streams = sorted(streams, key=str)
    names = tuple(streams) if isinstance(streams, list | tuple) else ()
    if not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{kind}.streams must be 'main', 'all' or stream names; it is {streams!r}.")
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
