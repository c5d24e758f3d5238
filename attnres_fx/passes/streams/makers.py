"""Which modules make the value that a stream begins with: embeddings, seen through what is done to them after that."""

import re
from collections.abc import Collection

import torch
from torch.fx import Node

from attnres_fx.passes.graph.module_paths import module_path
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.operations import asks_only_metadata, is_dropout, may_be_in_norm, op_name
from attnres_fx.passes.streams.data import is_weight
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums

_SHOWN = 3
#: What Dynamo calls an argument `x`.
_LOCAL = re.compile(r"^[lL]_(\w+)_$")


def made_by(root: Node, sums: FormalSums, inside: Collection[str]) -> str:
    """The modules that make a root, as a person would name them; the inputs or the node where no module does.

    Norms, dropout, factors, casts, views and sums on the way are seen through. Several modules of one part (the three
    tables of an embedding) go by its path, unless the stream itself is in that part.

    Args:
        root: The root of a stream.
        sums: The states of the graph.
        inside: The module paths of what is written into the stream.
    """
    makers = _makers(root, sums)
    modules = list(dict.fromkeys(name for n in makers if (name := _named(n))))
    if len(modules) > 1:
        part = _common([m.split(".") for m in modules])
        if part and not any(p == part or p.startswith(f"{part}.") for p in inside):
            return part
    if not modules:
        modules = [_name_of_parameter(n) for n in makers if is_weight(n)] or [module_path(root) or _called(root)]
    more = [f"{len(modules) - _SHOWN} more"] if len(modules) > _SHOWN else []
    return " + ".join([*modules[:_SHOWN], *more])


def part_of(addend: Node, root: Node, sums: FormalSums) -> str:
    """The path of the part that makes a term: the innermost module around all that computes it from the stream last.

    Args:
        addend: The value of the term.
        root: The root of its stream.
        sums: The states of the graph.
    """
    makers = [n for n in _makers(addend, sums) if not is_weight(n) and n not in sums.states]
    makers = [n for n in makers if sums.dependence.at_all(n, root)] or makers  # not what a gate comes from
    paths = [p.split(".") for n in makers if (p := module_path(n)) and n.op != "placeholder"]
    return _common(paths) or module_path(addend)


def _named(node: Node) -> str:
    """The module whose code a maker is, or the name of an input; nothing of a parameter."""
    if is_weight(node):
        return ""
    return _LOCAL.sub(r"\1", str(node.target)) if node.op == "placeholder" else module_path(node)


def _name_of_parameter(node: Node) -> str:
    return str(node.target) if node.op == "get_attr" else node.name


def _called(node: Node) -> str:
    """What makes a value that no module, input or parameter makes, `zeros_like`: the same whatever tracer named it."""
    name = op_name(node)
    return name if name.isidentifier() and name not in ("module", "getattr", "getitem") else node.name


def _makers(root: Node, sums: FormalSums) -> list[Node]:
    """What a root is made from by elementwise work, norms and joins alone, in graph order."""
    found: set[Node] = set()
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        before = [n for n in node.all_input_nodes if not asks_only_metadata(node, n)]
        before = [n for n in before if _holds_floats(n)]
        before = [n for n in before if not is_weight(n)] or before
        through = may_be_in_norm(node) or is_dropout(node)
        carried = isinstance(sums.states.get(node), Extended)
        if node.op in ("placeholder", "get_attr") or carried or not through or not before:
            found.add(node)
            continue
        stack += [n for n in before if n not in seen]
        seen.update(before)
    return sorted(found)


def _holds_floats(node: Node) -> bool:
    """Whether a node is a floating tensor or several, as far as that is known: a size makes no value."""
    value = value_of(node)
    parts = value if isinstance(value, list | tuple) else (value,)
    return value is None or any(isinstance(p, torch.Tensor) and p.is_floating_point() for p in parts)


def _common(paths: list[list[str]]) -> str:
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
