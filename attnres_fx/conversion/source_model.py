"""What `convert`, `inspect` and `plan` take: models of several kinds, and a config."""

from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from attnres_fx.config import AttnResConfig, RewriteConfig
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.errors import AlreadyConvertedError, ConfigError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes.lowering.read_calls import OPERATORS
from attnres_fx.passes.rewrite.topology import read_operators, topology_of

Model = nn.Module | ExportedProgram


def checked_config(config: RewriteConfig | None) -> RewriteConfig:
    """A config, the default one for None; ConfigError for what is none, or of a topology that nobody registered."""
    if not isinstance(config, RewriteConfig | None):
        raise ConfigError(
            f"config must be an AttnResConfig or a HyperConnectionsConfig; it is a {type(config).__name__}."
        )
    config = config or AttnResConfig()
    topology_of(config)
    return config


def refuse_converted(model: Any) -> None:
    """Raise AlreadyConvertedError for what reads through depth attention already."""
    graph = model.graph if isinstance(model, GraphModule | ExportedProgram) else None
    holds_reads = graph is not None and any(n.target in OPERATORS | read_operators() for n in graph.nodes)
    if isinstance(model, ConvertedModel) or holds_reads:
        raise AlreadyConvertedError(
            "the model reads through depth attention already: convert the original again, with another config "
            "if you like."
        )
    if isinstance(getattr(model, "attnres", None), AttnResParameters) and not isinstance(model, GraphModule):
        raise AlreadyConvertedError(
            f"{type(model).__name__} is attached for the compile backend: detach(model) first, to convert it."
        )


def model_name(model: Any) -> str:
    """What errors and reports call a model."""
    return type(model).__name__ if isinstance(model, nn.Module) else "ExportedProgram"
