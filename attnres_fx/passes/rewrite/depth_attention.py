"""Put depth attention where residual streams are read.

Before:
    h1 = h0 + attn(norm_1(h0))
    h2 = h1 + mlp(norm_2(h1))
    y  = head(norm_3(h2))
After (variant "full"):
    v1 = attn(norm_1(h0))
    r1 = depth_attention([h0, v1], q1, k1, eps, 2)
    v2 = mlp(norm_2(r1))
    r2 = depth_attention([h0, v1, v2], q2, k2, eps, 3)
    y  = head(norm_3(r2))
"""

from typing import Any

from torch.fx import GraphModule, Node

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import RewriteError
from attnres_fx.ops.general import READ_OPERATORS
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.rewrite.execution import Replacement, execute_plan
from attnres_fx.passes.rewrite.insertion import ReadParameters, insert_read
from attnres_fx.passes.rewrite.planning import plan_depth_reads
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, ReadPlan
from attnres_fx.passes.rewrite.topology import FetchParameter, Topology, checked_entries, register_topology
from attnres_fx.passes.streams.stream import StreamSet
from attnres_fx.stream_reads import DepthRead


def insert_depth_attention_pass(
    gm: GraphModule, *, streams: StreamSet, plan: ReadPlan, config: AttnResConfig, fetch: FetchParameter
) -> PassResult:
    """Execute a read plan, in place.

    The additions that this leaves without users are removed; everything else stays.

    Args:
        gm: The graph.
        streams: The streams of this graph.
        plan: What becomes of them, planned on this graph.
        config: eps, and the form of the reads.
        fetch: Inserts a parameter of a read: `"query"`, `"key_weight"`, `"gate"` or `"bias"`.

    Returns:
        A `Replacement` for each read, and the names of the nodes that were removed.

    Raises:
        RewriteError: A read of the graph does not see the sources that were planned, or lacks a parameter.
    """

    def put(read: DepthReadPlan, site: Node, sources: list[Node]) -> tuple[Node, Node]:
        query, key_weight = (fetch(read, site, n) if config.has_queries else None for n in ("query", "key_weight"))
        gate, bias = fetch(read, site, "gate"), fetch(read, site, "bias") if config.has_biases else None
        if config.has_queries and (query is None or key_weight is None):
            raise RewriteError(f"the read {read.read!r} of {read.stream!r} has no query, or no key gain.")
        if config.has_biases and bias is None:
            raise RewriteError(f"the read {read.read!r} of {read.stream!r} has no bias.")
        return insert_read(read, site, sources, ReadParameters(query, key_weight, gate, bias), config)

    return execute_plan(gm, streams, plan, put=put)


def _make_read(read: DepthReadPlan, config: AttnResConfig, **where: Any) -> DepthRead:
    return DepthRead(read.read, read.width, gated=read.gated, config=config, num_sources=read.num_sources, **where)


def _described_read(described: Any, config: AttnResConfig) -> DepthRead:
    kinds = (str, int, bool, int) if config.has_biases else (str, int, bool)
    name, width, gated, *sources = checked_entries(described, *kinds)
    return DepthRead(name, width, gated=gated, config=config, num_sources=sum(sources), device="meta")


register_topology(
    Topology(
        config=AttnResConfig,
        plan=plan_depth_reads,
        make_read=_make_read,
        described_read=_described_read,
        insert=insert_depth_attention_pass,
        operators=frozenset(READ_OPERATORS),
    )
)

__all__ = ["Replacement", "insert_depth_attention_pass"]
