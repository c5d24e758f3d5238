"""The parameters that the reads of a graph need, made new."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph

from attnres_fx.config import AttnResConfig
from attnres_fx.parameters import AttnResParameters, DepthRead
from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.streams.finding import Stream, StreamSet
from attnres_fx.passes.streams.selection import reads_in_order


def make_parameters(
    graph: Graph, root: nn.Module, streams: StreamSet, selected: Sequence[Stream], config: AttnResConfig
) -> AttnResParameters:
    """Queries, key gains and gates for the reads of a graph, in the dtype most of the model's weights have."""
    by_name = {n.name: n for n in graph.nodes}
    made = []
    for stream, read in reads_in_order(streams, selected):
        value = tensor_of(by_name[read.site])
        assert value is not None
        gated = config.output == "sum" and stream.post_norm
        dtype = _parameter_dtype(root) or value.dtype
        made.append(DepthRead(read.name, stream.width, gated=gated, dtype=dtype, device=_device(value, root)))
    return AttnResParameters(made, config)


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
