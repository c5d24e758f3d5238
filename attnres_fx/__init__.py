"""Compiler passes that turn the residual connections of a transformer into attention over depth.

Importing the package imports no torch; the first public name that is used does. The operators are registered with that
name, and at once where torch is imported already. `import attnres_fx.ops` registers them and does nothing else.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from attnres_fx import errors
from attnres_fx._version import __version__

if TYPE_CHECKING:
    from attnres_fx import ops
    from attnres_fx.analysis.callbacks import DepthWeightsCallback, LightningDepthWeightsCallback
    from attnres_fx.analysis.depth_profile import DepthProfile, profile_depth
    from attnres_fx.analysis.depth_weights import DepthWeights, depth_weights
    from attnres_fx.analysis.weight_log import log_depth_weights
    from attnres_fx.backend.attach import attach, detach, plain
    from attnres_fx.backend.compile import compile
    from attnres_fx.backend.explain import explain
    from attnres_fx.backend.pretrained import from_pretrained
    from attnres_fx.config import AttnResConfig
    from attnres_fx.conversion.adapter import export_adapter, load_adapter, save_adapter
    from attnres_fx.conversion.convert import convert
    from attnres_fx.conversion.converted_model import ConvertedModel
    from attnres_fx.conversion.inspection import inspect
    from attnres_fx.conversion.loading import load
    from attnres_fx.conversion.verify import verify
    from attnres_fx.errors import AttnResError
    from attnres_fx.optimizer_groups import parameter_groups
    from attnres_fx.parameters import convert_state
    from attnres_fx.partition.plan.build_stages import build_stages
    from attnres_fx.partition.plan.load_plan import load_plan
    from attnres_fx.partition.plan.planning import plan
    from attnres_fx.passes.lowering.lower import Lowering
    from attnres_fx.passes.rewrite.hyper_connections.config import HyperConnectionsConfig

_HOMES = {
    "AttnResConfig": "attnres_fx.config",
    "AttnResError": "attnres_fx.errors",
    "ConvertedModel": "attnres_fx.conversion.converted_model",
    "DepthProfile": "attnres_fx.analysis.depth_profile",
    "DepthWeights": "attnres_fx.analysis.depth_weights",
    "DepthWeightsCallback": "attnres_fx.analysis.callbacks",
    "LightningDepthWeightsCallback": "attnres_fx.analysis.callbacks",
    "HyperConnectionsConfig": "attnres_fx.passes.rewrite.hyper_connections.config",
    "Lowering": "attnres_fx.passes.lowering.lower",
    "attach": "attnres_fx.backend.attach",
    "build_stages": "attnres_fx.partition.plan.build_stages",
    "compile": "attnres_fx.backend.compile",
    "convert": "attnres_fx.conversion.convert",
    "convert_state": "attnres_fx.parameters",
    "depth_weights": "attnres_fx.analysis.depth_weights",
    "detach": "attnres_fx.backend.attach",
    "explain": "attnres_fx.backend.explain",
    "export_adapter": "attnres_fx.conversion.adapter",
    "from_pretrained": "attnres_fx.backend.pretrained",
    "inspect": "attnres_fx.conversion.inspection",
    "load": "attnres_fx.conversion.loading",
    "load_adapter": "attnres_fx.conversion.adapter",
    "load_plan": "attnres_fx.partition.plan.load_plan",
    "log_depth_weights": "attnres_fx.analysis.weight_log",
    "parameter_groups": "attnres_fx.optimizer_groups",
    "plain": "attnres_fx.backend.attach",
    "plan": "attnres_fx.partition.plan.planning",
    "profile_depth": "attnres_fx.analysis.depth_profile",
    "save_adapter": "attnres_fx.conversion.adapter",
    "verify": "attnres_fx.conversion.verify",
}

__all__ = [
    "AttnResConfig",
    "AttnResError",
    "ConvertedModel",
    "DepthProfile",
    "DepthWeights",
    "DepthWeightsCallback",
    "HyperConnectionsConfig",
    "LightningDepthWeightsCallback",
    "Lowering",
    "__version__",
    "attach",
    "build_stages",
    "compile",
    "convert",
    "convert_state",
    "depth_weights",
    "detach",
    "errors",
    "explain",
    "export_adapter",
    "from_pretrained",
    "inspect",
    "load",
    "load_adapter",
    "load_plan",
    "log_depth_weights",
    "ops",
    "parameter_groups",
    "plain",
    "plan",
    "profile_depth",
    "save_adapter",
    "verify",
]


_OPERATORS = "attnres_fx.ops"

if "torch" in sys.modules:
    importlib.import_module(_OPERATORS)


def __getattr__(name: str) -> Any:
    if name != "ops" and name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    operators = importlib.import_module(_OPERATORS)
    if name == "ops":
        return operators
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "ops"})
