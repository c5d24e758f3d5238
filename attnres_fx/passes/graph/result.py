"""What a pass returns, and the one way to run one."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from attnres_fx.errors import AttnResError, OperatorError, RewriteError
from attnres_fx.passes.graph.operations import op_name

log = logging.getLogger("attnres_fx.passes")


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Args:
        graph_module: The module that it worked on.
        modified: Whether it changed the module.
        replaced: What it put in, as data of the pass's own.
        removed: Names of the nodes that it took out.
        name: The pass; `run_pass` fills it in.
        difference: The operations that are fewer and more after it; `run_pass` fills it in.
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
    """Run a pass; where it changed something, lint the graph and log one line.

    Args:
        function: The pass, `(gm, *, options) -> PassResult`.
        gm: The module it works on.
        options: The options of the pass.

    Returns:
        Its result, with the pass's name and the difference in operations.

    Raises:
        RewriteError: The pass raised an error that is not one of the library's; it is the cause.
    """
    before = _operations(gm)
    with defects_named(function.__name__):
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


def replacing(gm: GraphModule, instead: Callable[[Node], Node | None]) -> PassResult:
    """Put something else in the place of nodes, in place, going over the graph once.

    Args:
        gm: The module to work on.
        instead: What stands for a node, inserted by it; None for a node that stays.

    Returns:
        The module, and the names of the nodes that are no longer there.
    """
    removed = []
    for node in list(gm.graph.nodes):
        found = instead(node)
        if found is not None:
            node.replace_all_uses_with(found)
            removed.append(node.name)
            gm.graph.erase_node(node)
    return PassResult(gm, bool(removed), (), tuple(removed))


class defects_named:
    """Let what goes wrong inside the library reach its callers as an error of the library's, with its cause.

    A class, since a generator would take the StopIteration of another for its own.

    Args:
        what: What is being done, in a word or two.

    Raises:
        RewriteError: Anything but an `AttnResError` was raised, or the operator refused what a pass gave to it.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        known = isinstance(error, AttnResError) and not isinstance(error, OperatorError)
        if isinstance(error, Exception) and not known:
            raise RewriteError(_defect(self.what, error)) from error


def _defect(what: str, error: Exception) -> str:
    return (
        f"{what} does not know what to do with this graph ({type(error).__name__}: {error}). The model was left as it "
        f"is. This is a defect of attnres_fx: report it with the model's code. A stream can be left out by "
        f"AttnResConfig(streams=[names]); attnres_fx.inspect lists their names."
    )


def _operations(gm: GraphModule) -> Counter[str]:
    return Counter(op_name(n) or n.op for n in gm.graph.nodes if n.op not in ("placeholder", "output"))
