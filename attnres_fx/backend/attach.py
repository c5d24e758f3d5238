"""`attach` and `detach`: an AttnRes model that keeps its Python API, rewritten by the compile backend.

`attach` registers the queries and gains on the model and lets its `forward` hand them to the graph. From then on
the model runs compiled, or raises.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.fx import GraphModule

from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.programs import capture
from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.errors import AlreadyConvertedError, AttachError, ConfigError
from attnres_fx.ops.marker import PARAMETERS
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import Read, Stream, analyze_, plan_schedule
from attnres_fx.passes.rewrite.parameters import make_parameters
from attnres_fx.passes.streams.selection import reads_in_order, select_streams

_NAME = "attnres"


@dataclass(frozen=True, order=True)
class ReadKey:
    """What a read must be in every graph of a model to be the same read."""

    name: str
    stream: str
    width: int
    position: int
    extras: int
    gated: bool


@dataclass(frozen=True)
class Attachment:
    """What a backend is told of an attached model: its config and its reads, in the order of their tensors."""

    config: AttnResConfig
    reads: tuple[ReadKey, ...]

    def to_text(self) -> str:
        reads = [dataclasses.astuple(r) for r in self.reads]
        return json.dumps({"config": dataclasses.asdict(self.config), "reads": reads}, sort_keys=True)

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def from_text(text: str) -> "Attachment":
        data = json.loads(text)
        return Attachment(AttnResConfig(**data["config"]), tuple(ReadKey(*r) for r in data["reads"]))


class AttachedParameters(AttnResParameters):
    """The parameters of an attached model, with what the backend must know of them.

    about: an Attachment as text. It goes into the graph, so a graph is made again when it changes.
    """

    def __init__(self, made: AttnResParameters, keys: Sequence[ReadKey]) -> None:
        super().__init__(list(made.reads), made.config)
        self.keys = tuple(keys)
        self.plain = False
        self._write_about()

    def _write_about(self) -> None:
        self.about = Attachment(self.config, self.keys).to_text()

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state)
        self._write_about()

    def tensors(self) -> list[Tensor]:
        """Query, key gain and gate of each read, in the order of `keys`."""
        return [t for r in self.reads for t in (r.query, r.key_weight, r.gate) if t is not None]


def attach(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: AttnResConfig | None = None,
) -> AttnResParameters:
    """Register `model.attnres`, the queries and gains of an AttnRes form of a model, in place.

    model: an nn.Module; it is captured once, in its own mode, to find its reads. args, kwargs: example arguments.
    config: AttnResConfig().
    Returns `model.attnres`. The model then runs under `torch.compile(model, backend="attnres")` and raises
    EagerCallError elsewhere; its parameters are found by optimizers and `state_dict`, its own names unchanged.

    Raises AttachError where it is attached already, and what `convert` raises where it cannot be rewritten.
    """
    config = AttnResConfig() if config is None else config
    _check_attachable(model, config)
    mode: Mode = "train" if model.training else "eval"
    captured = capture(model, args, kwargs, modes=(mode,))
    gm = next(iter(captured.graphs.values())).gm
    streams = analyze_(gm)
    selected = select_streams(streams, config, type(model).__name__)
    for stream in selected:
        plan_schedule(stream.num_sublayers, config)
    made = make_parameters(gm.graph, captured.root, streams, selected, config)
    keys = [read_key(s, r, config) for s, r in reads_in_order(streams, selected)]
    parameters = AttachedParameters(made, keys)
    model.add_module(_NAME, parameters)
    model.__class__ = _attached_class(cast(Any, type(model)))
    return parameters


def detach(model: nn.Module) -> None:
    """Take `model.attnres` off again, in place: the model is what it was before `attach`.

    Raises AttachError where it is not attached.
    """
    require_attached(model)
    model = unwrapped(model)
    base = vars(type(model)).get("_attnres_base")
    if base is None:
        raise AttachError(f"the class of this {type(model).__name__} was changed after attach: undo that first.")
    model.__class__ = base
    delattr(model, _NAME)
    model._compiled_call_impl = None


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Run an attached model's original function on purpose, uncompiled, inside this context."""
    attached = require_attached(model)
    model = unwrapped(model)
    compiled, before = model._compiled_call_impl, attached.plain
    attached.plain, model._compiled_call_impl = True, None
    try:
        yield model
    finally:
        attached.plain = before
        if is_attached(model):
            model._compiled_call_impl = compiled


def require_attached(model: nn.Module) -> AttachedParameters:
    found = unwrapped(model)._modules.get(_NAME)
    if not isinstance(found, AttachedParameters):
        raise AttachError(
            f"{type(model).__name__} is not attached: call attnres_fx.attach(model, args, kwargs, config=...) first."
        )
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, of what `torch.compile(model)` returned for it."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def read_key(stream: Stream, read: Read, config: AttnResConfig) -> ReadKey:
    gated = stream.post_norm and config.output == "sum"
    return ReadKey(read.name, stream.name, stream.width, read.position, len(read.extras), gated)


def _check_attachable(model: Any, config: Any) -> None:
    if not isinstance(config, AttnResConfig):
        raise ConfigError(f"config must be an AttnResConfig; it is a {type(config).__name__}.")
    if isinstance(model, ConvertedModel):
        raise AlreadyConvertedError("the model is converted already: attach the original, or torch.compile this.")
    if not isinstance(model, nn.Module) or isinstance(model, GraphModule):
        raise AttachError(
            f"attach takes an nn.Module with code of its own, not a {type(model).__name__}: convert() takes graphs."
        )
    if isinstance(model._modules.get(_NAME), AttachedParameters):
        raise AttachError(f"{type(model).__name__} is attached already: detach(model) first, to attach it anew.")
    if hasattr(model, _NAME):
        raise AttachError(f"{type(model).__name__} has an attribute {_NAME!r} of its own, where attach would put its.")
    if "forward" in vars(model):
        raise AttachError(
            f"the forward of this {type(model).__name__} is replaced on the instance: attach the model before whatever "
            f"wraps it."
        )


@functools.cache
def _attached_class(base: Any) -> Any:
    """A class that differs from a model's own in its forward alone, so that copies and pickles have it too."""
    original = base.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = self.attnres
        if not attached.plain:
            PARAMETERS(attached.tensors(), attached.about)
        return original(self, *args, **kwargs)

    def reduce(self: Any, _: Any) -> Any:
        return _new, (base,), self.__getstate__()

    kept = {"forward": forward, "_attnres_base": base, "__reduce_ex__": reduce}
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**named, **kept})


def _new(base: type[nn.Module]) -> Any:
    made = _attached_class(cast(Any, base))
    return made.__new__(made)


def is_attached(model: nn.Module) -> bool:
    """Whether a model carries parameters that the backend will use."""
    return isinstance(model._modules.get(_NAME), AttachedParameters)


__all__ = ["AttachedParameters", "Attachment", "ReadKey", "attach", "detach", "is_attached", "plain"]
