"""Compiler passes that turn the residual connections of a transformer into attention over depth."""

from attnres_fx import errors
from attnres_fx._version import __version__
from attnres_fx.attach import attach, detach, plain
from attnres_fx.compile import compile, explain
from attnres_fx.config import AttnResConfig
from attnres_fx.convert import convert, inspect
from attnres_fx.converted import ConvertedModel
from attnres_fx.depth_weights import depth_weights
from attnres_fx.errors import AttnResError
from attnres_fx.parameters import parameter_groups
from attnres_fx.passes.lowering import Lowering
from attnres_fx.pipeline import build_stages, load_plan, plan
from attnres_fx.storage import load
from attnres_fx.verify import verify

__all__ = [
    "AttnResConfig",
    "AttnResError",
    "ConvertedModel",
    "Lowering",
    "__version__",
    "attach",
    "build_stages",
    "compile",
    "convert",
    "depth_weights",
    "detach",
    "errors",
    "explain",
    "inspect",
    "load",
    "load_plan",
    "parameter_groups",
    "plain",
    "plan",
    "verify",
]
