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
Query = Literal["static", "input"]
Weights = Literal["softmax", "sigmoid", "static"]


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
    def form(self) -> tuple[str, ...]:
        """The names of further options that are shown, which are not the defaults."""
        return ()

    @property
    def does(self) -> str:
        """What becomes of the streams, after "2 streams"."""
        return f"rewritten with {type(self).__name__}"

    @property
    def summary(self) -> str:
        """The options that matter most, in a few words."""
        return ", ".join(f"{name} {getattr(self, name)}" for name in (*self.always_shown, *self.form))

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


#: What takes part in the logits of queries and keys alone.
_OF_LOGITS = ("query", "heads", "source_bias", "key_norm", "scale")
#: What a read does with its sources, and how many it sees.
_OF_FORM = (*_OF_LOGITS, "value_norm", "window", "window_keeps_root", "weights")


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
        query: `"static"`: a learned vector [D]; `"input"`: a learned projection [D, D] of the newest source of the
            read, each token's own divided by its root mean square.
        heads: into how many equal parts the width is cut, each with its own weights over depth.
        source_bias: whether every source of every read has a learned scalar that is added to its logit.
        value_norm: whether sources are divided by their root mean square where they are mixed too, as keys are.
        key_norm: whether keys are sources divided by their root mean square; False for raw dot products.
        scale: multiplies the products of query and keys.
        window: how many of its newest sources a read sees; None for all.
        window_keeps_root: whether a read sees the root (the token embedding) beside those.
        weights: what becomes of the logits over depth. `"softmax"`; `"sigmoid"`: each by itself; `"static"`: the
            softmax of one learned scalar a source, whatever the input is.

    Raises:
        ConfigError: A value, or a combination of values, is not allowed.

    Source: arXiv 2603.15031, sections 3.1 and 3.2, and its ablations.
    """

    variant: Variant = "block"
    num_blocks: int | None = None
    block_size: int | None = None
    boundaries: Sequence[int] | None = None
    output: Output = "sum"
    eps: float = 1e-6
    streams: str | Sequence[str] = "main"
    query: Query = "static"
    heads: int = 1
    source_bias: bool = False
    value_norm: bool = False
    key_norm: bool = True
    scale: float = 1.0
    window: int | None = None
    window_keeps_root: bool = True
    weights: Weights = "softmax"

    of_function: ClassVar[tuple[str, ...]] = ("variant", "output", "eps", *_OF_FORM)
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

    @property
    def form(self) -> tuple[str, ...]:
        """The names of the options by which its reads are not plain ones."""
        return tuple(name for name in _OF_FORM if getattr(self, name) != getattr(AttnResConfig, name))

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
        self._check_form()
        self._check_start()

    @property
    def has_queries(self) -> bool:
        """Whether reads have queries and key gains."""
        return self.weights != "static"

    @property
    def has_biases(self) -> bool:
        """Whether reads have a learned scalar a source."""
        return self.source_bias or self.weights == "static"

    def _check_form(self) -> None:
        """Raise ConfigError where an option of the form of a read has no value it can have, or means nothing."""
        _require_one_of("query", self.query, get_args(Query))
        _require_one_of("weights", self.weights, get_args(Weights))
        for name in ("source_bias", "value_norm", "key_norm", "window_keeps_root"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"AttnResConfig.{name} must be True or False; it is {getattr(self, name)!r}.")
        if self.heads is None:
            raise ConfigError("AttnResConfig.heads must be a whole number of at least 1; it is None.")
        _require_positive_int("heads", self.heads)
        _require_positive_int("window", self.window)
        if not isinstance(self.scale, int | float) or isinstance(self.scale, bool) or not 0 < self.scale < math.inf:
            raise ConfigError(f"AttnResConfig.scale must be a finite number above 0; it is {self.scale!r}.")
        object.__setattr__(self, "scale", float(self.scale))
        meaningless = [n for n in _OF_LOGITS if getattr(self, n) != getattr(AttnResConfig, n)]
        if self.weights == "static" and meaningless:
            raise ConfigError(
                f"AttnResConfig(weights='static') weighs sources by one learned scalar each and computes no products "
                f"of queries and keys, so {meaningless[0]}={getattr(self, meaningless[0])!r} means nothing: leave it "
                f"out, or choose weights='softmax' or 'sigmoid'."
            )
        self._check_window()

    def _check_window(self) -> None:
        if self.window is None:
            if not self.window_keeps_root:
                raise ConfigError("AttnResConfig.window_keeps_root=False means nothing without a window: give window.")
            return
        if self.variant == "local":
            raise ConfigError(
                "AttnResConfig(variant='local') reads its own block alone, which is a window already: leave window "
                "out, or choose variant='full' or 'block'."
            )
        if self.window == 1 and not self.window_keeps_root:
            raise ConfigError(
                "AttnResConfig(window=1, window_keeps_root=False) leaves one source to a read, which weighs nothing: "
                "choose a window of at least 2, or keep the root."
            )

    def _check_start(self) -> None:
        """Raise ConfigError where mode "sum" could not start as the original."""
        why = "normalises what is summed" if self.value_norm else "leaves out older terms of the sum"
        given = "value_norm=True" if self.value_norm else f"window={self.window}"
        if self.output == "sum" and (self.value_norm or self.window is not None):
            raise ConfigError(
                f"AttnResConfig({given}) {why}, so output='sum' cannot start as the original does: "
                f"choose output='mean', and train the result."
            )


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
