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

import logging
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from attnres_fx.passes.graph_tools import copy_call, copy_meta, same_shape, set_value, tensor_of, value_of
from attnres_fx.passes.result import PassResult
from attnres_fx.passes.spelling import CASTS, IDENTITIES, RESHAPES, is_aten, op_name
from attnres_fx.passes.storages import aliased_argument, mutated_argument, returns_what_it_writes, storage_of

log = logging.getLogger(__name__)

_FUNCTIONAL = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.imatmul: operator.matmul,
}
#: Views that show the whole storage in its order: always, or where the shape stays.
_KEEPS_ORDER = RESHAPES | IDENTITIES | CASTS | {"dropout"}
_KEEPS_ORDER_AT_SAME_SHAPE = frozenset("slice narrow expand expand_as broadcast_to getitem".split())


def functionalize_mutations_pass(gm: GraphModule) -> PassResult:
    """Rewrite, in place, every write into an intermediate value or an input as a new value."""
    pass_ = _Functionalizer(gm)
    changed = pass_.run()
    if changed:
        gm.graph.lint()
        log.info("functionalize mutations: %d writes made values", len(changed))
    return PassResult(gm, bool(changed), (), tuple(changed))


class _Functionalizer:
    """Walks the graph once; arguments are original nodes until a node is placed, and current values after.

    same: result of a write -> the tensor it wrote to. parent: view -> what it is a view of. argument: view ->
    the node that stands for its parent in its own arguments.
    version: how often a storage was written to. current: node -> the version it was last seen at, and the
    node that holds its value there.
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
        written_by: list[Node] = []
        for node in nodes:
            written = mutated_argument(node)
            if node.op == "output":
                self._copy_back(node)
            if written is None or self._base(self._tensor(written)).op == "get_attr":
                self._place(node)
                continue
            if self._base(self._tensor(written)).op == "placeholder":
                self.inputs[self._base(self._tensor(written))] = None
            written_by.append(node)
            self._make_value(node, self._tensor(written))
        for node in reversed(written_by):
            self.graph.erase_node(node)
        return [n.name for n in written_by]

    def _writes(self, node: Node) -> bool:
        written = mutated_argument(node)
        return written is not None and storage_of(written)[-1].op != "get_attr"

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
        if parent is None:
            return
        self.parent[node] = self._tensor(parent)
        self.argument[node] = self._now(parent)
        self.base[node] = self._base(self.parent[node])
        self.current[node] = (self.version.get(self.base[node], 0), node)

    def _now(self, node: Node) -> Node:
        """The node that holds a node's current value; views of what was written to are made again."""
        node = self._tensor(node)
        version = self.version.get(self._base(node), 0)
        known, value = self.current.get(node, (0, node))
        if known == version:
            return value
        value = copy_call(node, {self.argument[node]: self._now(self.parent[node])})
        self.current[node] = (version, value)
        return value

    def _make_value(self, node: Node, written: Node) -> None:
        base = self._base(written)
        with self.graph.inserting_before(node):
            args: Any = map_arg(node.args, self._now)
            kwargs: Any = map_arg(node.kwargs, self._now)
            target = self._now(written)
            functional = _functional_target(node)
            if functional is not None and self._covers(written):
                if kwargs.get("inplace") is True:
                    kwargs = {**kwargs, "inplace": False}
                value = self._in_dtype_of(self._called(node, functional, args, kwargs), target)
                self._advance(base, value if written is base else self._shaped_like(value, self._now(base)))
                self.current[written] = (self.version[base], value)
            else:
                self._advance(base, self._cloned(self._now(base)))
                view = self._now(written)
                args, kwargs = (map_arg(a, lambda n: view if n is target else n) for a in (args, kwargs))
                result = self._called(node, node.target, args, kwargs)
                self.current[node] = (0, result)
        if returns_what_it_writes(node):
            self.same[node] = written

    def _advance(self, base: Node, whole: Node) -> None:
        self.version[base] = self.version.get(base, 0) + 1
        self.current[base] = (self.version[base], whole)

    def _covers(self, written: Node) -> bool:
        """Whether a view shows all of its storage in order, so that a write to it is a write to all."""
        while written is not self._base(written):
            parent = self.parent[written]
            name = op_name(written)
            if name not in _KEEPS_ORDER and not (name in _KEEPS_ORDER_AT_SAME_SHAPE and same_shape(written, parent)):
                return False
            written = parent
        return True

    def _called(self, node: Node, target: Any, args: Any, kwargs: Any) -> Node:
        called = self.graph.create_node(node.op, target, args, kwargs)
        called.meta = dict(node.meta)
        return called

    def _in_dtype_of(self, value: Node, target: Node) -> Node:
        """An in-place operation keeps the dtype of what it writes to; its functional form may promote."""
        kept = tensor_of(target)
        assert kept is not None
        others = [v.dtype for n in value.all_input_nodes if (v := tensor_of(n)) is not None and v.dim() > 0]
        if all(torch.promote_types(kept.dtype, d) == kept.dtype for d in others):
            return value
        if is_aten(value):
            cast = self.graph.call_function(torch.ops.aten.to.dtype, (value, kept.dtype))
        else:
            cast = self.graph.call_method("to", (value, kept.dtype))
        copy_meta(cast, value)
        set_value(cast, value_of(value), value)
        return cast

    def _cloned(self, node: Node) -> Node:
        return self._like(node, torch.ops.aten.clone.default if is_aten(node) else torch.clone, (node,))

    def _shaped_like(self, value: Node, base: Node) -> Node:
        if same_shape(value, base):
            return value
        target = torch.ops.aten.reshape_as.default if is_aten(value) else torch.Tensor.reshape_as
        return self._like(base, target, (value, base))

    def _like(self, node: Node, target: Any, args: tuple[Any, ...]) -> Node:
        made = self.graph.call_function(target, args)
        copy_meta(made, node)
        set_value(made, value_of(node), node)
        return made

    def _copy_back(self, output: Node) -> None:
        with self.graph.inserting_before(output):
            for node in self.inputs:
                target = torch.ops.aten.copy_.default if is_aten(self._now(node)) else torch.Tensor.copy_
                self._like(node, target, (node, self._now(node)))


def _functional_target(node: Node) -> Any:
    if node.op == "call_module" or node.target is operator.setitem:
        return None
    if node.kwargs.get("inplace") is True:
        return node.target
    if node.op == "call_method":
        plain = str(node.target).removesuffix("_")
        return plain if hasattr(torch.Tensor, plain) else None
    if node.target in _FUNCTIONAL:
        return _FUNCTIONAL[node.target]  # type: ignore[index]
    if isinstance(node.target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, node.target._schema.name.split("::")[1].removesuffix("_"), None)
        overload = getattr(packet, node.target._overloadname, None)
        return overload if overload is not None and not overload._schema.is_mutable else None
    name = getattr(node.target, "__name__", "").removesuffix("_")
    return getattr(torch, name, None)
