"""In-place operations as values: after this pass a node means one value for good.

Before:
    y = h.add_(f)         # h and every view of h change
    z = norm(h)
After:
    y = h.add(f)
    z = norm(y)

A source is read long after it was written, so nothing may overwrite it; and an in-place add on a state is
an add like any other. Where an operation has no functional form, or writes through a view that picks
rows, the storage is cloned first. Writes into parameters and buffers are left alone, since callers see
them; an input that is written to gets its final value copied back at the end, for the same reason.
"""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from attnres_fx.passes.graph.aliasing import (
    aliased_argument,
    mutated_arguments,
    reshaped_in_place,
    returns_what_it_writes,
    storage_of,
    written_as_one,
)
from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import (
    computed_value,
    copy_call,
    fake_like,
    same_shape,
    set_value,
    tensor_of,
    value_of,
)
from attnres_fx.passes.graph.operation_table import BY_OPERATOR, Trait
from attnres_fx.passes.graph.operations import has_trait, op_name
from attnres_fx.passes.graph.result import PassResult

#: Views that show the whole storage in its order.
_KEEPS_ORDER = Trait.RESHAPE | Trait.IDENTITY | Trait.CAST


def functionalize_mutations_pass(gm: GraphModule) -> PassResult:
    """Rewrite, in place, every write into an intermediate value or an input as a new value.

    Args:
        gm: A module with values on the nodes of its graph.

    Returns:
        The module, and the names of the writes that are no longer there.
    """
    pass_ = _Functionalizer(gm)
    changed = pass_.run()
    if changed:
        gm.graph.lint()
    return PassResult(gm, bool(changed), (), tuple(changed))


class _Functionalizer:
    """Walks the graph once; arguments are original nodes until a node is placed, and current values after.

    Attributes:
        same: The result of a write, and the tensor it wrote to.
        parent: A view, and what it is a view of.
        argument: A view, and the node that stands for its parent in its own arguments.
        base: A view, and the node that owns its storage.
        version: How often a storage was written to.
        current: A node, the version it was last seen at, and the node that holds its value there.
        inputs: The inputs of the graph that are written to, in the order of the writes.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.graph = gm.graph
        self.same: dict[Node, Node] = {}
        self.parent: dict[Node, Node] = {}
        self.argument: dict[Node, Node] = {}
        self.base: dict[Node, Node] = {}
        self.version: dict[Node, int] = {}
        self.current: dict[Node, tuple[int, Node]] = {}
        self.inputs: dict[Node, None] = {}

    def run(self) -> list[str]:
        nodes = list(self.graph.nodes)
        if not any(self._writes(n) for n in nodes):
            return []
        erased: list[Node] = []
        for node in nodes:
            written = [self._tensor(n) for n in mutated_arguments(node)]
            if node.op == "output":
                self._copy_back(node)
            if (reshaped := reshaped_in_place(node)) is not None and self._base(
                self._tensor(reshaped)
            ).op != "get_attr":
                erased.append(node)
                self._reshape(node, self._tensor(reshaped))
                continue
            if not written or any(self._base(n).op == "get_attr" for n in written):
                self._place(node)
                continue
            self.inputs.update({self._base(n): None for n in written if self._base(n).op == "placeholder"})
            erased.append(node)
            self._make_value(node, written)
        for node in reversed(erased):
            self.graph.erase_node(node)
        return [n.name for n in erased]

    def _writes(self, node: Node) -> bool:
        targets = [*mutated_arguments(node), *((r,) if (r := reshaped_in_place(node)) is not None else ())]
        return any(storage_of(n)[-1].op != "get_attr" for n in targets)

    def _tensor(self, node: Node) -> Node:
        while node in self.same:
            node = self.same[node]
        return node

    def _base(self, node: Node) -> Node:
        return self.base.get(node, node)

    def _place(self, node: Node) -> None:
        """A node that writes nothing: let it see current values, and note what it is a view of."""
        parent = aliased_argument(node)
        with self.graph.inserting_before(node):
            node.args = map_arg(node.args, self._now)
            node.kwargs = map_arg(node.kwargs, self._now)
        if parent is not None:
            self._note_view(node, self._tensor(parent), self._now(parent))

    def _note_view(self, node: Node, parent: Node, argument: Node) -> None:
        self.parent[node] = parent
        self.argument[node] = argument
        self.base[node] = self._base(parent)
        self.current[node] = (self.version.get(self.base[node], 0), node)

    def _now(self, node: Node) -> Node:
        """The node that holds what a node of the original graph would hold here."""
        return self._value(self._tensor(node))

    def _value(self, node: Node) -> Node:
        """Current value of a tensor; views of what was written to are made again."""
        version = self.version.get(self._base(node), 0)
        known, value = self.current.get(node, (0, node))
        if known == version:
            return value
        value = copy_call(node, {self.argument[node]: self._value(self.parent[node])})
        self.current[node] = (version, value)
        return value

    def _reshape(self, node: Node, tensor: Node) -> None:
        """From here on the tensor is a view of what it was."""
        with self.graph.inserting_before(node):
            value = self._value(tensor)
            args = map_arg(node.args, self._now)
            view = self._called(node, _functional_target(node), args, map_arg(node.kwargs, self._now))
        self._note_view(view, tensor, value)
        self.same[node] = self.same[tensor] = view

    def _make_value(self, node: Node, written: list[Node]) -> None:
        with self.graph.inserting_before(node):
            functional = _functional_target(node)
            if functional is not None and written_as_one(node) and self._covers(written[0]):
                self._make_functional(node, functional, written[0])
            else:
                self._write_to_clones(node, written)
        if returns_what_it_writes(node):
            self.same[node] = written[0]

    def _make_functional(self, node: Node, functional: Any, written: Node) -> None:
        base, target = self._base(written), self._value(written)
        kwargs = map_arg(node.kwargs, self._now)
        if kwargs.get("inplace") is True:
            kwargs = {**kwargs, "inplace": False}
        value = self._in_dtype_of(self._called(node, functional, map_arg(node.args, self._now), kwargs), target)
        self._advance(base, value if written is base else self._shaped_like(value, self._value(base)))
        self.current[written] = (self.version[base], value)

    def _write_to_clones(self, node: Node, written: list[Node]) -> None:
        """Let a write that has no functional form go to copies of the storages it writes into."""
        before = {self._value(n): n for n in written}
        for base in dict.fromkeys(self._base(n) for n in written):
            self._advance(base, self._cloned(self._value(base)))

        def now(seen: Node) -> Node:
            value = self._now(seen)
            return self._value(before[value]) if value in before else value

        result = self._called(node, node.target, map_arg(node.args, now), map_arg(node.kwargs, now))
        self.current[node] = (0, result)

    def _advance(self, base: Node, whole: Node) -> None:
        self.version[base] = self.version.get(base, 0) + 1
        self.current[base] = (self.version[base], whole)

    def _covers(self, written: Node) -> bool:
        """Whether a view shows all of its storage in order, so that a write to it is a write to all."""
        while written is not self._base(written):
            parent = self.parent[written]
            seen, whole = tensor_of(written), tensor_of(parent)
            if seen is None or whole is None or seen.dtype != whole.dtype:
                return False
            in_order = has_trait(written, _KEEPS_ORDER) or op_name(written) == "dropout"
            whole_view = has_trait(written, Trait.SAME_AT_SAME_SHAPE) and same_shape(written, parent)
            if not in_order and not whole_view:
                return False
            written = parent
        return True

    def _called(self, node: Node, target: Any, args: Any, kwargs: Any) -> Node:
        called = self.graph.create_node(node.op, target, args, kwargs)
        called.meta = dict(node.meta)
        if target is not node.target and isinstance(
            value := computed_value(node.op, target, args, kwargs), torch.Tensor
        ):
            set_value(called, value, node)
        return called

    def _in_dtype_of(self, value: Node, target: Node) -> Node:
        """An in-place operation keeps the dtype of what it writes to; its functional form may promote."""
        kept, made = tensor_of(target), tensor_of(value)
        assert kept is not None and made is not None
        if made.dtype == kept.dtype:
            return value
        return emit(self.graph, "to", (value, kept.dtype), like=value, value=fake_like(made, kept.dtype))

    def _cloned(self, node: Node) -> Node:
        return emit(self.graph, "clone", (node,), like=node, value=value_of(node))

    def _shaped_like(self, value: Node, base: Node) -> Node:
        if same_shape(value, base):
            return value
        return emit(self.graph, "reshape_as", (value, base), like=base, value=value_of(base), dialect=value)

    def _copy_back(self, output: Node) -> None:
        with self.graph.inserting_before(output):
            for node in self.inputs:
                value = self._value(node)
                emit(self.graph, "copy_", (node, value), like=node, value=value_of(node), dialect=value)


def _functional_target(node: Node) -> Any:
    if node.op == "call_module" or node.target is operator.setitem or node.kwargs.get("out") is not None:
        return None
    if node.kwargs.get("inplace") is True:
        return node.target
    if node.op == "call_method":
        plain = str(node.target).removesuffix("_")
        return plain if hasattr(torch.Tensor, plain) else None
    if (known := BY_OPERATOR.get(node.target)) is not None and known.functional is not None:  # type: ignore[arg-type]
        return known.functional
    if isinstance(node.target, torch._ops.OpOverload):
        return _functional_overload(node.target)
    name = getattr(node.target, "__name__", "").removesuffix("_")
    return getattr(torch, name, None)


def _functional_overload(target: torch._ops.OpOverload) -> Any:
    packet = getattr(torch.ops.aten, target._schema.name.split("::")[1].removesuffix("_"), None)
    wanted = [str(a.type) for a in target._schema.arguments]
    for name in packet.overloads() if packet is not None else ():
        found = getattr(packet, name)
        if not found._schema.is_mutable and [str(a.type) for a in found._schema.arguments] == wanted:
            return found
    return None
