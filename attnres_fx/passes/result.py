"""What a pass returns."""

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule


@dataclass(frozen=True)
class PassResult:
    """The module a pass worked on, whether it changed it, what it put in and the names of what it took out."""

    graph_module: GraphModule
    modified: bool
    replaced: tuple[Any, ...] = ()
    removed: tuple[str, ...] = ()
