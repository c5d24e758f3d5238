"""Module paths: which module's code made a node, however a tracer writes it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

Steps = tuple[str, ...]

_REPEATED_CALL = re.compile(r"@\d+")
_STEP = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]|([^.\[\]]+)")
_STORES = ("_modules", "__dict__")
#: What Dynamo's names of local and global variables begin with.
_VARIABLE = ("L[", "G[")


def module_path(node: Node) -> str:
    """Dotted path of the module whose code made a node, as `named_modules` spells it; `""` for the root."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))
    source = path[0] if isinstance(path, tuple | list) else str(path)
    return ".".join(path_steps(source)[2 if source.startswith(_VARIABLE) else 0 :])


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module of a tree at a dotted path; None where there is none."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def common_calls(nodes: Sequence[Node]) -> list[str]:
    """Paths of the modules of which one call runs all of some nodes, the outermost first.

    Two calls of one module are two: tracers number them in the keys of the stack.
    """
    stacks = [node.meta.get("nn_module_stack") or {} for node in nodes]
    shared: list[str] = []
    for entries in zip(*(s.items() for s in stacks), strict=False):
        if len({key for key, _ in entries}) > 1:
            break
        path = entries[0][1]
        shared.append(".".join(path_steps(path[0] if isinstance(path, tuple | list) else str(path))))
    return shared


def path_steps(source: str) -> Steps:
    """The steps from attribute to attribute of what a tracer writes for a module or a tensor.

    `L['self'].__dict__['_modules']['norms'].0` and `L['self'].norms[0]` both are `("L", "self", "norms", "0")`.
    """
    found = _STEP.findall(_REPEATED_CALL.sub("", source))
    return tuple(s for pair in found for s in pair if s and s not in _STORES)


@dataclass(frozen=True)
class ModulePaths:
    """The paths of a model's modules, by what Dynamo writes of them.

    Attributes:
        by_id: The path of each module by its `id` as text, which is how Dynamo keys the stack of a node.
        roots: How Dynamo writes the model or a part of it, in steps, and the part's path: for modules that the model
            does not register.
    """

    by_id: Mapping[str, str]
    roots: tuple[tuple[Steps, str], ...]

    def path(self, key: str, source: str) -> str | None:
        """The path of one module in the model; None for a module outside of it."""
        known = self.by_id.get(_REPEATED_CALL.sub("", key))
        if known is not None:
            return known
        steps = path_steps(source)
        for root, path in self.roots:
            if steps[: len(root)] == root:
                return ".".join([*([path] if path else []), *steps[len(root) :]])
        return None


def paths_by_id(model: nn.Module) -> dict[str, str]:
    """The path of each module of a model by its `id` as text; the first of several, as `named_modules` has it."""
    return {str(id(module)): path for path, module in model.named_modules()}


def name_modules_(nodes: Iterable[Node], paths: ModulePaths) -> None:
    """Write the module stacks of nodes from Dynamo as paths that begin below a model, in place.

    Args:
        nodes: Nodes of a graph, of its bodies too.
        paths: Of the model. Modules outside of it are taken off.
    """
    for node in nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            named = {key: (paths.path(key, str(path)), kind) for key, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = {k: (path, kind) for k, (path, kind) in named.items() if path is not None}
