"""`torch.ops.attnres_fx.parameters`: how queries and gains reach a Dynamo graph, and the guard against plain runs.

An attached model's `forward` calls it first. Under Dynamo it lifts the parameters to inputs of the graph, where
the backend finds them and takes the call out. Anywhere else it runs, and running it is the error: the model
would go on to compute plain residuals.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from attnres_fx.errors import EagerCallError
from attnres_fx.ops.operator import library

library.define("parameters(Tensor[] tensors, str about) -> ()")


def _refuse(tensors: list[Tensor], about: str) -> None:
    raise EagerCallError(
        "the model is attached and was called outside torch.compile(..., backend='attnres'), where it would "
        "compute plain residuals. Call model.compile(backend='attnres', fullgraph=True, dynamic=True) first "
        "(attnres_fx.compile does); an outer torch.compile with another backend (Trainer's torch_compile=True) "
        "takes its place, so leave that off. A copy of a compiled model (deepcopy, pickle, AveragedModel) is not "
        "compiled: compile the copy too, in the same way. If this one is compiled, look at "
        "TORCH_LOGS=graph_breaks,recompiles: after a graph break, or past torch._dynamo.config.recompile_limit, "
        "PyTorch runs it uncompiled unless fullgraph=True. To run the original on purpose: "
        "`with attnres_fx.plain(model):`."
    )


def _fake(tensors: list[Tensor], about: str) -> None:
    return None


def _refuse_in_a_trace(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> None:
    _refuse(*args, **(kwargs or {}))


library.impl("parameters", _refuse, "CompositeExplicitAutograd")
library._register_fake("parameters", _fake)

#: What stands in a Dynamo graph: `PARAMETERS(tensors, about)`.
PARAMETERS = torch.ops.attnres_fx.parameters.default

# A compiler behind another backend would drop a call without results, and compile plain residuals.
for _mode in (FunctionalTensorMode, ProxyTorchDispatchMode):
    torch.library.register_torch_dispatch("attnres_fx::parameters", _mode, _refuse_in_a_trace)
