"""Leave out what nothing looks at: a sum that is computed and dropped is part of no stream.

Before:
    unused = h + g(h)
    y = h + f(h)
    return y
After:
    y = h + f(h)
    return y

`torch.fx` has a pass of this name, which takes methods that write in place for pure, and custom calls for dead. Here
only what is known to be without effect goes: random draws stay, since those after them depend on how many there were.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from attnres_fx.passes.graph.aliasing import mutated_arguments, reshaped_in_place
from attnres_fx.passes.graph.mutation_order import find_writes
from attnres_fx.passes.graph.operation_table import BY_NAME, Trait
from attnres_fx.passes.graph.operations import (
    called_module,
    has_trait,
    hooked,
    is_random,
    op_name,
    trains,
    writes_in_place,
)
from attnres_fx.passes.graph.result import PassResult

#: Modules of torch that have no state, draw nothing and call nothing of their own.
_PURE_MODULES = (
    nn.Identity,
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Flatten,
    nn.Unflatten,
    nn.GELU,
    nn.ReLU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softmax,
)


def remove_dead_code_pass(gm: GraphModule) -> PassResult:
    """Erase, in place, the calls that have neither users nor an effect, and what they alone took in.

    Args:
        gm: A module. Values on the nodes of its graph are not needed.

    Returns:
        The module, and the names of the nodes that are no longer there.
    """
    removed = []
    orphans: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if not node.users and (node in orphans if node.op == "get_attr" else _is_pure(node)):
            orphans.update(node.all_input_nodes)
            removed.append(node.name)
            gm.graph.erase_node(node)
    if removed:
        gm.graph.lint()
    return PassResult(gm, bool(removed), (), tuple(reversed(removed)))


@dataclass(frozen=True)
class Live:
    """The nodes of a graph whose values get out of it.

    What only keeps random draws in their order is in the graph and in neither of the two.

    Attributes:
        observed: Into its output, into a tensor that others hold, or anywhere unknown.
        returned: The same without tensors that others hold, unless the output is computed from them.
    """

    observed: frozenset[Node]
    returned: frozenset[Node]


def find_live(graph: Graph) -> Live:
    """Find the nodes whose values get out of a graph with values on its nodes, which is left as it is."""
    writes = find_writes(graph)
    observed: set[Node] = set()
    returned: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in observed or _is_observed(node):
            observed.update((node, *node.all_input_nodes))
        if node in returned or (node not in writes.targets and _is_observed(node)):
            returned.update((node, *writes.inputs(node)))
    return Live(frozenset(observed), frozenset(returned))


def _is_observed(node: Node) -> bool:
    return not _is_pure(node) and not (_is_known(node) and _draws(node) and not _has_effect(node))


def _is_pure(node: Node) -> bool:
    """Whether a node does nothing but make its value."""
    if node.op == "get_attr":
        return True
    return _is_known(node) and not _has_effect(node) and not _draws(node)


def _is_known(node: Node) -> bool:
    """Whether a node is an operation of torch's, or a module of it that does nothing on the side."""
    if node.op in ("placeholder", "output", "get_attr"):
        return False
    if node.op == "call_module":
        module = called_module(node)
        return module is not None and not hooked(module) and (type(module) in _PURE_MODULES or _is_dropout(module))
    name, home = op_name(node), getattr(node.target, "__module__", None) or "torch"
    if node.op == "call_function" and home.split(".")[0] not in ("torch", "_operator", "operator", "builtins"):
        return False  # somebody else's, whatever its name
    return "::" not in name and (name in BY_NAME or hasattr(torch.ops.aten, name))


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and type(module).__module__.startswith("torch.")


def _has_effect(node: Node) -> bool:
    """Whether a known node writes to a tensor, states something or switches a mode; batch norms in training write."""
    if node.op == "call_module":
        return bool(getattr(called_module(node), "inplace", False))
    if has_trait(node, Trait.SWITCHES_MODE | Trait.CHECK | Trait.MODE_REGION) or writes_in_place(node):
        return True
    if reshaped_in_place(node) is not None or mutated_arguments(node):
        return True
    name = op_name(node)
    return ("batch_norm" in name and trains(node) is not False) or name == "instance_norm" or not _returns(name)


def _draws(node: Node) -> bool:
    """Whether a known node draws random numbers, or may."""
    if node.op == "call_module":
        module = called_module(node)
        return module is not None and _is_dropout(module) and getattr(module, "p", 1.0) != 0
    if op_name(node) in ("sdpa", "dropout"):
        return trains(node) is True
    return is_random(node) or _may_draw(op_name(node))


@cache
def _may_draw(name: str) -> bool:
    """Whether aten says so of an operation, or gives it a probability to drop."""
    overloads = _overloads(name)
    drops = any("dropout" in a.name for o in overloads for a in o._schema.arguments)
    return drops or any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads)


@cache
def _returns(name: str) -> bool:
    """Whether an operation of aten's has a value; one without is there for its effect."""
    overloads = _overloads(name)
    return not overloads or any(o._schema.returns for o in overloads)


def _overloads(name: str) -> list[torch._ops.OpOverload]:
    packet = getattr(torch.ops.aten, name, None)
    return [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
