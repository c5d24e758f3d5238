"""Code of a model's own class that adds to a stream without going through its forward: found, and refused.

Only a call of a converted model runs its graph, and only forward of an attached one is compiled. A method that does by
itself what forward does would compute plain residuals.
"""

import functools
import inspect
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from attnres_fx.errors import EditedError
from attnres_fx.ops.dispatch import is_traced
from attnres_fx.passes import ReadPlan
from attnres_fx.passes.graph.module_paths import module_path

_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\w+)')
#: Modules that also stand on a stream itself: a call of one says nothing of who adds.
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.Identity)
#: Whose frames are no code of the model.
_LIBRARIES = ("attnres_fx.", "torch.")

WAY_OUT = (
    "Let forward do that when an argument asks for it, `model(x, features=True)`: such a call is captured, or "
    "compiled, when it is first made. Or use the original."
)


def methods_that_add(root: nn.Module, gm: GraphModule, plan: ReadPlan) -> tuple[str, ...]:
    """The methods of the root's class, forward aside, in which sums of the rewritten streams are made.

    Args:
        root: The module.
        gm: Its graph, not rewritten yet.
        plan: Of the graph.
    """
    frames = {f for node in _additions(gm, plan) for f in _FRAME.findall(node.meta.get("stack_trace") or "")}
    lines: dict[tuple[str, str], set[int]] = {}
    for file, line, name in frames:
        lines.setdefault((file, name), set()).add(int(line))
    names = (n for n in dir(type(root)) if not (hasattr(nn.Module, n) or n.startswith("__")))
    return tuple(n for n in names if _holds_a_line(inspect.getattr_static(type(root), n), lines))


def _holds_a_line(attribute: Any, lines: dict[tuple[str, str], set[int]]) -> bool:
    function = inspect.unwrap(attribute) if isinstance(attribute, types.FunctionType) else None
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    own = {line for *_, line in code.co_lines()}
    return not own.isdisjoint(lines.get((code.co_filename, code.co_name), ()))


def branches_of_root(root: nn.Module, gm: GraphModule, plan: ReadPlan) -> tuple[str, ...]:
    """The submodules that the root's own code calls for what it adds to the rewritten streams itself.

    Args:
        root: The module.
        gm: Its graph, not rewritten yet.
        plan: Of the graph.
    """
    nodes = {n.name: n for n in gm.graph.nodes}
    paths: dict[str, None] = {}
    for stream in plan.streams:
        for term in stream.stream.terms:
            if term.node in nodes and term.written_by in nodes and not module_path(nodes[term.written_by]):
                paths |= dict.fromkeys(_called_for(root, nodes[term.node]))
    return tuple(paths)


def _additions(gm: GraphModule, plan: ReadPlan) -> Iterator[Node]:
    nodes = {n.name: n for n in gm.graph.nodes}
    for stream in plan.streams:
        yield from (nodes[t.written_by] for t in stream.stream.terms if t.written_by in nodes)


def _called_for(root: nn.Module, value: Node) -> Iterator[str]:
    """The paths of the nearest calls, from the root's own code, that a value is made of."""
    pending, seen = [value], {value}
    while pending:
        node = pending.pop()
        path = _outermost(root, node)
        if path and not isinstance(root.get_submodule(path), _NORMS):
            yield path
            continue
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending += fresh


def _outermost(root: nn.Module, node: Node) -> str:
    """The path of the module in the root's tree that the root's own code calls, of which a node is part."""
    parts = module_path(node).split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        try:
            module = root.get_submodule(path)
        except AttributeError:
            return ""
        if path and not isinstance(module, nn.ModuleList | nn.ModuleDict | torch.jit.ScriptModule):
            return path
    return ""


def refuse_around(path: str, module: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the forward of a submodule that the root's own code calls: refuses only where that does."""
    if not is_traced() and (method := _method_that_calls(path, module)):
        raise EditedError(
            f"{method} of a converted model called {path} (a {type(module).__name__}) by itself: that code adds plain "
            f"residuals, and only a call of the whole model runs the converted graph. {WAY_OUT}"
        )
    return own(*args, **kwargs) if own is not None else type(module).forward(module, *args, **kwargs)


def _method_that_calls(path: str, module: nn.Module) -> str:
    """The name of the running function that works on a converted model with this submodule; empty where none does."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and not str(frame.f_globals.get("__name__")).startswith(_LIBRARIES):
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, nn.Module) and "_attnres_conversion" in owner.__dict__ and _has(owner, path, module):
                return code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _has(owner: nn.Module, path: str, module: nn.Module) -> bool:
    try:
        return owner.get_submodule(path) is module
    except AttributeError:
        return False


def refusing(method: Any) -> Any:
    """A method of a converted model that raises, because its code adds to a converted stream."""

    @functools.wraps(method)
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise EditedError(
            f"{method.__name__} of a converted model was called: its own code adds plain residuals, and only a call of "
            f"the whole model runs the converted graph. {WAY_OUT}"
        )

    return refuse
