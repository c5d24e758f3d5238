"""Hyper-connections: another topology on the streams that depth attention rewrites.

A stream is carried as several copies. Source: arXiv 2409.19606; constrained to doubly stochastic mixing, arXiv
2512.24880.
"""

from typing import Any

from attnres_fx.passes.rewrite.hyper_connections.config import HyperConnectionsConfig
from attnres_fx.passes.rewrite.hyper_connections.connection import HyperConnection
from attnres_fx.passes.rewrite.hyper_connections.insertion import insert_hyper_connections_pass
from attnres_fx.passes.rewrite.hyper_connections.operators import HYPER_READ
from attnres_fx.passes.rewrite.hyper_connections.planning import plan_hyper_connections
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan
from attnres_fx.passes.rewrite.topology import Topology, checked_entries, register_topology


def _make_read(read: DepthReadPlan, config: HyperConnectionsConfig, **where: Any) -> HyperConnection:
    return HyperConnection(
        read.read,
        read.width,
        config=config,
        place=read.position,
        writes=read.writes,
        gated=read.gated,
        **where,
    )


def _described_read(described: Any, config: HyperConnectionsConfig) -> HyperConnection:
    name, width, gated, place, writes = checked_entries(described, str, int, bool, int, bool)
    return HyperConnection(name, width, config=config, place=place, writes=writes, gated=gated, device="meta")


register_topology(
    Topology(
        config=HyperConnectionsConfig,
        plan=plan_hyper_connections,
        make_read=_make_read,
        described_read=_described_read,
        insert=insert_hyper_connections_pass,
        operators=frozenset({HYPER_READ}),
    )
)

__all__ = ["HyperConnection", "HyperConnectionsConfig", "insert_hyper_connections_pass", "plan_hyper_connections"]
