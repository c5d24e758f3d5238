"""What the backend must know of an attached model: the description that goes into its graphs."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from attnres_fx.backend.compile_log import CompileLog, compile_log
from attnres_fx.config import AttnResConfig
from attnres_fx.errors import AttachError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import DepthReadPlan

#: The attribute that holds a model's queries and gains.
ATTRIBUTE = "attnres"


@dataclass(frozen=True, order=True)
class ReadKey:
    """Identity of a read: what it must be in every graph of a model to be the same read."""

    name: str
    stream: str
    width: int
    position: int
    extras: int
    gated: bool


@dataclass(frozen=True)
class Attachment:
    """Description of an attached model for the backend: its config and its reads, in the order of their tensors."""

    config: AttnResConfig
    reads: tuple[ReadKey, ...]

    def to_text(self) -> str:
        """The description as JSON, equal for models that are attached alike."""
        reads = [dataclasses.astuple(r) for r in self.reads]
        return json.dumps({"config": dataclasses.asdict(self.config), "reads": reads}, sort_keys=True)

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def from_text(text: str) -> "Attachment":
        """The description that `to_text` wrote."""
        data = json.loads(text)
        return Attachment(AttnResConfig(**data["config"]), tuple(ReadKey(*r) for r in data["reads"]))


class AttachedParameters(AttnResParameters):
    """The parameters of an attached model, with what the backend must know of them.

    Attributes:
        keys: The reads, in the order of their tensors.
        plain: Whether the model runs its original function, inside `plain()`.
        about: An Attachment as text. It goes into the graph, so the model is compiled again when it changes.
    """

    def __init__(self, parameters: AttnResParameters, keys: Sequence[ReadKey]) -> None:
        super().__init__(list(parameters.reads), parameters.config)
        self.keys = tuple(keys)
        self.plain = False
        self._logs: dict[str, CompileLog] = {}
        self._write_about()

    def _write_about(self) -> None:
        self.about = Attachment(self.config, self.keys).to_text()
        self._logs[self.about] = compile_log(self.about)

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state)
        self._write_about()

    @property
    def log(self) -> CompileLog:
        """Graphs compiled for this attachment."""
        return self._logs[self.about]

    def tensors(self) -> list[Tensor]:
        """Query, key gain and gate of each read, in the order of `keys`."""
        return [t for r in self.reads for t in (r.query, r.key_weight, r.gate) if t is not None]


def require_attached(model: nn.Module) -> AttachedParameters:
    """The parameters of an attached model. Raises AttachError where it is not attached."""
    attached = unwrapped(model)._modules.get(ATTRIBUTE)
    if not isinstance(attached, AttachedParameters):
        raise AttachError(
            f"{type(model).__name__} is not attached: call attnres_fx.attach(model, args, kwargs, config=...) first."
        )
    return attached


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, of what `torch.compile(model)` returned for it."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def read_key(read: DepthReadPlan) -> ReadKey:
    """The identity of a planned read."""
    return ReadKey(read.read, read.stream, read.width, read.position, len(read.extras), read.gated)


def is_attached(model: nn.Module) -> bool:
    """Whether a model carries parameters that the backend will use."""
    return isinstance(model._modules.get(ATTRIBUTE), AttachedParameters)
