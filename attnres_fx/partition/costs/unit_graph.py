"""A unit of the chain as a module by itself, on fake tensors of one size: what the measurements of its cost run.

A unit is a sublayer, or what stands before the first or after the last. Its body is everything it computes but
depth reads, whose outputs are inputs of the body, as are parameters and what other units hand over.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from attnres_fx.passes.graph.example_sizes import example_size
from attnres_fx.passes.graph.nodes import nodes_without_gradients, value_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait

#: Where bodies run, wherever their graph was captured: kernels of other devices refuse each some dtypes or layouts.
DEVICE = torch.device("meta")

#: Stands for a size that depends on data (how many tokens an expert gets), where a tracer has no example of it.
UNKNOWN_SIZE = 1


@dataclass(frozen=True)
class BodyInput:
    """One input of a body.

    Args:
        node: What it stands for.
        kind: `"parameter"`, `"read"` (a depth read's output that is no source itself) or `"other"`.
        differentiable: Whether its gradient is computed.
    """

    node: Node
    kind: str
    differentiable: bool


@dataclass(frozen=True, eq=False)
class Body:
    """A unit's own computation as a graph of its own.

    Args:
        gm: Takes `inputs`, returns what others use of it.
        inputs: What it takes.
        key: Equal for bodies of the same structure: operations, shapes, dtypes, wiring.
        outputs: The nodes of the model's graph whose values it returns.
        nodes: The nodes of the model's graph that it was copied from.
    """

    gm: GraphModule
    inputs: tuple[BodyInput, ...]
    key: tuple[Any, ...]
    outputs: tuple[Node, ...]
    nodes: tuple[Node, ...]

    def fake_inputs(self, mode: FakeTensorMode) -> list[Tensor]:
        return [_input_tensor(i, mode) for i in self.inputs]


def _input_tensor(taken: BodyInput, mode: FakeTensorMode) -> Tensor:
    value = fake_tensor(tensor_value(taken.node), mode)
    return value.requires_grad_() if taken.differentiable else value


def hint(size: Any) -> Any:
    """A number as it was in the example: UNKNOWN_SIZE where a symbolic one depends on data."""
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return size
    known = example_size(size)
    return UNKNOWN_SIZE if known is None else known


def bytes_of(value: Any) -> int:
    """Bytes of a tensor with the sizes of the example, as if it were contiguous; of all tensors in a tuple."""
    tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    return sum(_numel(t) * t.element_size() for t in tensors)


def _numel(value: Tensor) -> int:
    count = 1
    for size in value.shape:
        count *= hint(size)
    return count


def fake_mode() -> FakeTensorMode:
    """A mode for tensors without data: sizes that depend on data become symbols, all others are plain."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake_tensor(value: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of the same sizes, strides and dtype without data, on DEVICE."""
    with mode:
        sizes, strides = [hint(s) for s in value.shape], [hint(s) for s in value.stride()]
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=DEVICE)


def tensor_value(node: Node) -> Tensor:
    value = held_value(node)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node} holds a {type(value).__name__}, not a tensor")
    return value


def held_value(node: Node) -> Any:
    """What is known of a node's value; what an attribute holds where the tracer noted nothing."""
    value = value_of(node)
    root = node.graph.owning_module
    if value is None and node.op == "get_attr" and root is not None:
        return attrgetter(str(node.target))(root)
    return value


def parameter_of(node: Node) -> torch.nn.Parameter | None:
    """The parameter a node fetches."""
    root = node.graph.owning_module
    if node.op != "get_attr" or root is None:
        return None
    found = attrgetter(str(node.target))(root)
    return found if isinstance(found, torch.nn.Parameter) else None


def is_returned(node: Node) -> bool:
    """Whether the model itself returns a node's value."""
    return any(u.op == "output" for u in node.users)


def is_read(node: Node) -> bool:
    """Whether a node is one of this library's own operators: the planner counts those itself."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "attnres_fx"


@dataclass(frozen=True, eq=False)
class GraphFacts:
    """What a graph says about its nodes as a whole.

    Args:
        differentiable: Nodes whose gradient a backward pass needs, since they depend on a trained parameter through
            differentiable steps.
        frozen: Nodes that run where gradients are off.
    """

    differentiable: frozenset[Node]
    frozen: frozenset[Node]


def graph_facts(gm: GraphModule) -> GraphFacts:
    frozen = nodes_without_gradients(gm.graph)
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            parameter = parameter_of(node)
            if parameter is not None and parameter.requires_grad:
                found.add(node)
        elif node not in frozen and found.intersection(node.all_input_nodes) and _carries_gradient(node):
            found.update((node, *_written_to(node)))
    return GraphFacts(frozenset(found), frozen)


def _carries_gradient(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload) and node.target._schema.name in ("aten::detach", "aten::detach_"):
        return False
    values = pytree.tree_leaves(held_value(node))
    return any(isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def _written_to(node: Node) -> Iterable[Node]:
    """What an in-place operation changes: its first argument, and what that is a view of."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable or not node.args:
        return
    written = node.args[0]
    while isinstance(written, Node) and written.op == "call_function":
        yield written
        viewed = isinstance(written.target, OpOverload) and written.target.is_view
        written = written.args[0] if viewed and written.args else None


def extract_body(nodes: Sequence[Node], facts: GraphFacts) -> Body:
    """The body of a unit with these nodes.

    Symbolic sizes become the example's, devices DEVICE; calls that switch modes and checks of metadata go.
    """
    return _Extraction(nodes, facts).body()


class _Extraction:
    def __init__(self, nodes: Sequence[Node], facts: GraphFacts) -> None:
        self.facts = facts
        computed = frozenset(n for n in nodes if computes(n))
        # Of a tuple that another unit made, its parts are taken in.
        self.members = frozenset(n for n in computed if n.target is not operator.getitem or n.args[0] in computed)
        self.own = sorted(self.members)
        self.graph = Graph()
        self.copies: dict[Node, Any] = {}
        self.inputs: list[BodyInput] = []
        self.holder = torch.nn.Module()

    def body(self) -> Body:
        for needed in dict.fromkeys(n for node in self.own for n in node.all_input_nodes):
            if needed not in self.members:
                self._take_in(needed)
        for node in self.own:
            self.copies[node] = self._copy(node)
        outputs = [n for n in self.own if isinstance(value_of(n), Tensor) and self._is_used_outside(n)]
        self.graph.output(tuple(self.copies[n] for n in outputs))
        returned = tuple((str(self.copies[n]), is_returned(n)) for n in outputs)
        key = (*self._inputs_key(), *self._nodes_key(), returned)
        return Body(GraphModule(self.holder, self.graph), tuple(self.inputs), key, tuple(outputs), tuple(self.own))

    def _is_used_outside(self, node: Node) -> bool:
        return any(u not in self.members and (computes(u) or is_read(u) or u.op == "output") for u in node.users)

    def _take_in(self, node: Node) -> None:
        value = held_value(node)
        if isinstance(value, Tensor):
            kind = "parameter" if parameter_of(node) is not None else "read" if _only_read(node) else "other"
            self.inputs.append(BodyInput(node, kind, node in self.facts.differentiable))
            self.copies[node] = self.graph.placeholder(f"input_{len(self.inputs)}")
        elif isinstance(value, GraphModule):
            name = f"region_{len(self.copies)}"
            setattr(self.holder, name, value)
            self.copies[node] = self.graph.get_attr(name)
        else:
            self.copies[node] = pytree.tree_map(hint, value)

    def _copy(self, node: Node) -> Any:
        value = value_of(node)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return hint(value)
        args, kwargs = self._plain(map_arg((node.args, node.kwargs), lambda n: self.copies[n]))  # type: ignore[misc]
        copied = self.graph.create_node(node.op, node.target, args, kwargs)
        copied.meta["frozen"] = node in self.facts.frozen
        return copied

    def _plain(self, arguments: Any) -> Any:
        if isinstance(arguments, dict):
            return {k: self._plain(v) for k, v in arguments.items()}
        if isinstance(arguments, tuple | list):
            return type(arguments)(self._plain(v) for v in arguments)
        return DEVICE if isinstance(arguments, torch.device) else hint(arguments)

    def _inputs_key(self) -> Iterable[Any]:
        for taken in self.inputs:
            yield taken.kind, taken.differentiable, describe_value(tensor_value(taken.node))

    def _nodes_key(self) -> Iterable[Any]:
        for node in self.graph.nodes:
            if node.op == "call_function":
                yield str(node), str(node.target), str(node.args), str(node.kwargs), node.meta["frozen"]


def _only_read(node: Node) -> bool:
    """A read's output that no later read has among its sources: then nobody else keeps it."""
    return is_read(node) and not any(is_read(u) and node in _sources(u) for u in node.users)


def _sources(read: Node) -> Sequence[Any]:
    sources = read.args[0] if read.args else ()
    return sources if isinstance(sources, list | tuple) else ()


def describe_value(value: Any) -> Any:
    """Sizes, strides and dtype of a tensor, as part of a key."""
    if not isinstance(value, Tensor):
        return repr(hint(value))
    return tuple(map(hint, value.shape)), tuple(map(hint, value.stride())), value.dtype


def computes(node: Node) -> bool:
    """Whether a node is part of a body: a call that makes a value, and no depth read."""
    if node.op != "call_function" or is_read(node):
        return False
    return not has_trait(node, Trait.SWITCHES_MODE | Trait.ASKS_MODE | Trait.CHECK)


def is_higher_order(node: Node) -> bool:
    return isinstance(node.target, HigherOrderOperator)
