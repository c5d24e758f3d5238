"""What the backend must know of an attached model: the description that goes into its graphs."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from attnres_fx.backend.compile_log import CompiledGraph, CompileLog, compile_log
from attnres_fx.config import RewriteConfig
from attnres_fx.errors import AttachError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import DepthReadPlan
from attnres_fx.state_config import MadeFor

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
    """Description of an attached model, or of a part of it, for the backend.

    Attributes:
        config: What the model was attached with.
        reads: Its reads, or those of the part, in the order of their tensors.
        tensors: The names of each read's tensors, in their order.
        part: Path of the part in the model; empty for the model itself.
        homes: For each stream the path of the innermost module whose call runs all of it.
    """

    config: RewriteConfig
    reads: tuple[ReadKey, ...]
    tensors: tuple[tuple[str, ...], ...]
    part: str
    homes: tuple[tuple[str, str], ...]

    def to_text(self) -> str:
        """The description as JSON, equal for models that are attached alike."""
        reads = [dataclasses.astuple(r) for r in self.reads]
        about = {"config": self.config.to_data(), "reads": reads, "tensors": self.tensors}
        return json.dumps({**about, "part": self.part, "homes": self.homes}, sort_keys=True)

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def from_text(text: str) -> "Attachment":
        """The description that `to_text` wrote."""
        data = json.loads(text)
        reads = tuple(ReadKey(*r) for r in data["reads"])
        config = RewriteConfig.class_in(data["config"]).from_data(data["config"])
        tensors, homes = (tuple(map(tuple, data[name])) for name in ("tensors", "homes"))
        return Attachment(config, reads, tensors, data["part"], homes)


class AttachedParameters(AttnResParameters):
    """The parameters of an attached model, with what the backend must know of them.

    Attributes:
        keys: The reads, in the order of their tensors.
        homes: For each stream the path of the innermost module whose call runs all of it.
        parts: Paths of the modules that may be called by themselves, as `generate` calls an encoder, and which of the
            reads are theirs; the model itself is at `""`.
        abouts: An Attachment as text for each of the parts. It goes into the graph, so a model is compiled again when
            it changes.
    """

    def __init__(self, parameters: AttnResParameters, keys: Sequence[ReadKey], homes: Mapping[str, str]) -> None:
        super().__init__(list(parameters.reads), parameters.config, parameters.made_for.blocks)
        self.keys = tuple(keys)
        self.homes = dict(homes)
        paths = ("", *dict.fromkeys(p for p in homes.values() if p))
        self.parts = {p: tuple(i for i, k in enumerate(keys) if _is_within(homes[k.stream], p)) for p in paths}
        self._logs: dict[str, CompileLog] = {}
        self._write_about()

    def set_made_for(self, made_for: MadeFor) -> None:
        """Let the parameters be for another config; what is compiled is compiled again.

        Args:
            made_for: The other config, and its blocks.
        """
        super().set_made_for(made_for)
        self._write_about()

    def _write_about(self) -> None:
        homes, names = tuple(self.homes.items()), [tuple(read.tensors()) for read in self.reads]
        self.abouts = {
            path: Attachment(
                self.config, tuple(self.keys[i] for i in reads), tuple(names[i] for i in reads), path, homes
            ).to_text()
            for path, reads in self.parts.items()
        }
        self._logs |= {about: compile_log(about) for about in self.abouts.values()}

    @property
    def graphs(self) -> list[CompiledGraph]:
        """Graphs compiled for this attachment, those of the model itself first."""
        return [g for about in self.abouts.values() for g in self._logs[about].graphs]

    def tensors(self, part: str = "") -> list[Tensor]:
        """The tensors of each read of a part, in the order of `keys`."""
        reads = list(self.reads)
        return [tensor for i in self.parts[part] for tensor in reads[i].tensors().values()]

    def parts_of(self, model: nn.Module) -> list[nn.Module]:
        """The parts of the attached model that these are the parameters of, itself aside."""
        return [model.get_submodule(path) for path in self.parts if path]


def _is_within(path: str, part: str) -> bool:
    return part == "" or path == part or path.startswith(f"{part}.")


def require_attached(model: nn.Module) -> AttachedParameters:
    """The parameters of an attached model. Raises AttachError where it is not attached."""
    attached = unwrapped(model)._modules.get(ATTRIBUTE)
    if isinstance(attached, AttnResParameters) and not isinstance(attached, AttachedParameters):
        raise AttachError(
            f"{type(model).__name__} is a converted model; this is for attached ones (attnres_fx.attach)."
        )
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
