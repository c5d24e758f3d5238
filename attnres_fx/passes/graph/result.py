"""What a pass returns, and the one way to run one."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule

from attnres_fx.passes.graph.operations import op_name

log = logging.getLogger("attnres_fx.passes")


@dataclass(frozen=True)
class PassResult:
    """The module a pass worked on, whether it changed it, what it put in and the names of what it took out.

    name: the pass; difference: the operations that are fewer and more after it. Both are `run_pass`'s to fill in.
    """

    graph_module: GraphModule
    modified: bool
    replaced: tuple[Any, ...] = ()
    removed: tuple[str, ...] = ()
    name: str = ""
    difference: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.difference or 'as many operations of each kind'}"


def run_pass(function: Callable[..., PassResult], gm: GraphModule, **options: Any) -> PassResult:
    """Run a pass; where it changed something, lint and log one line with the difference in operations."""
    before = _operations(gm)
    result = function(gm, **options)
    if not result.modified:
        return replace(result, name=function.__name__)
    gm.graph.lint()
    after = _operations(gm)
    fewer, more = before - after, after - before
    parts = [*(f"-{n} {k}" for k, n in sorted(fewer.items())), *(f"+{n} {k}" for k, n in sorted(more.items()))]
    result = replace(result, name=function.__name__, difference=", ".join(parts))
    log.info("%s", result)
    return result


def _operations(gm: GraphModule) -> Counter[str]:
    return Counter(op_name(n) or n.op for n in gm.graph.nodes if n.op not in ("placeholder", "output"))
