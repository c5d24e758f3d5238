"""Which of the streams found are rewritten, and the parameters their reads need."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import NoStreamError, NotAdditiveError, StreamWidthError
from attnres_fx.parameters import AttnResParameters, DepthRead
from attnres_fx.passes import Read, Stream, StreamSet
from attnres_fx.passes.graph_tools import tensor_of


def select_streams(streams: StreamSet, config: AttnResConfig, name: str) -> tuple[Stream, ...]:
    for refusal in streams.refusals:
        if refusal.stops_conversion and config.streams in ("main", "all"):
            kind = NotAdditiveError if refusal.kind == "not additive" else StreamWidthError
            raise kind(f"{name}: at {refusal.place}, {refusal.reason}. {refusal.advice}")
    selected = streams.select(config.streams)
    if selected:
        return selected
    raise NoStreamError(_no_stream_message(streams, name))


def _no_stream_message(streams: StreamSet, name: str) -> str:
    why = "; ".join(f"{r.place}: {r.reason}" for r in streams.refusals)
    return (
        f"{name} has no residual stream: no addition x + f(x) was found in which f does more than elementwise "
        f"work on x." + (f" What came near: {why}." if why else "") + " See attnres_fx.inspect(model, args, kwargs)."
    )


def reads_in_order(streams: StreamSet, selected: Sequence[Stream]) -> list[tuple[Stream, Read]]:
    """Every read that gets an operator, in execution order over all streams."""
    order = {node.name: i for node, i in streams.sums.order.items()}
    reads = [(s, r) for s in selected for r in s.depth_reads]
    return sorted(reads, key=lambda pair: order[pair[1].site])


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
