"""What streams can become: one entry a topology, found by the class of the config.

A topology is a folder or a module that ends with `register_topology(Topology(...))`. `convert`, the backend, files,
adapters and reports take everything that differs from here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node

from attnres_fx.config import RewriteConfig
from attnres_fx.errors import ConfigError
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, ReadPlan
from attnres_fx.passes.streams.stream import Stream, StreamSet
from attnres_fx.stream_reads import StreamRead

#: Inserts, at the graph's insertion point, the node that holds one parameter of a read, by the parameter's name; None
#: where the read has none of that name. The node it is called with is the one whose metadata and value it takes after.
FetchParameter = Callable[[DepthReadPlan, Node, str], Node | None]


class InsertPass(Protocol):
    """A pass that executes a read plan, in place, and returns a `Replacement` for each read."""

    def __call__(
        self, gm: GraphModule, *, streams: StreamSet, plan: ReadPlan, config: Any, fetch: FetchParameter
    ) -> PassResult: ...


class MakeRead(Protocol):
    """Makes the module that holds a read's parameters, as a conversion starts with them."""

    def __call__(
        self, read: DepthReadPlan, config: Any, *, dtype: torch.dtype | None = None, device: Any = None
    ) -> StreamRead: ...


@dataclass(frozen=True)
class Topology:
    """One thing that streams can become.

    Attributes:
        config: The class of its configs.
        plan: Decides what the selected streams of a graph become: `(streams, selected, config) -> ReadPlan`.
        make_read: Makes the module of a planned read.
        described_read: Makes the same module from what `StreamRead.described()` returned, on the device `meta`.
        insert: Executes a plan.
        operators: What a graph that was rewritten holds, one node of them a read.
    """

    config: type[RewriteConfig]
    plan: Callable[[StreamSet, tuple[Stream, ...], Any], ReadPlan]
    make_read: MakeRead
    described_read: Callable[[Sequence[Any], Any], StreamRead]
    insert: InsertPass
    operators: frozenset[Any]


def checked_entries(described: Any, *kinds: type) -> list[Any]:
    """The entries of a described read.

    Args:
        described: What a file says.
        kinds: The type of each entry.

    Raises:
        ValueError: It is no list of such entries.
    """
    if not isinstance(described, list) or [type(entry) for entry in described] != list(kinds):
        raise ValueError(f"{', '.join(kind.__name__ for kind in kinds)} are expected")
    return described


_TOPOLOGIES: dict[type[RewriteConfig], Topology] = {}


def register_topology(topology: Topology) -> None:
    """Make a topology known.

    Args:
        topology: In the place of one of the same config class.
    """
    _TOPOLOGIES[topology.config] = topology


def topology_of(config: RewriteConfig) -> Topology:
    """The topology of a config.

    Raises:
        ConfigError: It was not registered.
    """
    if type(config) not in _TOPOLOGIES:
        known = ", ".join(sorted(c.__name__ for c in _TOPOLOGIES))
        raise ConfigError(f"no topology is registered for {type(config).__name__}; there are some for {known}.")
    return _TOPOLOGIES[type(config)]


def read_operators() -> frozenset[Any]:
    """What stands for a read in a graph that was rewritten, of every topology."""
    return frozenset().union(*(t.operators for t in _TOPOLOGIES.values()))
