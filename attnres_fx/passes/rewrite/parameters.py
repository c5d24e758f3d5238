"""The parameters that the reads of a graph need, made new."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph

from attnres_fx.config import RewriteConfig
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.rewrite.read_plan import ReadPlan
from attnres_fx.passes.rewrite.topology import topology_of


def make_parameters(graph: Graph, root: nn.Module, plan: ReadPlan, config: RewriteConfig) -> AttnResParameters:
    """The parameters of the planned reads, in the dtype most of the model's weights have."""
    by_name = {n.name: n for n in graph.nodes}
    dtype = _parameter_dtype(root)
    made = []
    for read in plan.reads:
        value = tensor_of(by_name[read.site])
        assert value is not None
        device = _device(value, root)
        make_read = topology_of(config).make_read
        made.append(make_read(read, config, dtype=dtype or value.dtype, device=device))
    return AttnResParameters(made, config, plan.blocks)


def _parameter_dtype(root: nn.Module) -> torch.dtype | None:
    """The dtype most of the model's floating-point weights have."""
    counts: dict[torch.dtype, int] = {}
    for parameter in root.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda d: counts[d], default=None)


def _device(value: Tensor, root: nn.Module) -> torch.device:
    fake = any(isinstance(p, FakeTensor) for p in root.parameters())
    return torch.device("meta") if fake else value.device
