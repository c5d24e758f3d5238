"""In-place operations as values: after this pass a node means one value for good.

Before:
    y = h.add_(f)         # h and every view of h change
    z = norm(h)
After:
    y = h.add(f)
    z = norm(y)

A source is read long after it was written, so nothing may overwrite it; and an in-place add on a state is
an add like any other. Where an operation has no functional form, or writes through a view that picks
rows, the storage is cloned first; so too where gradients do not see the write, under `no_grad` or through
`detach`: they pass it by. Writes into parameters and buffers stay, since callers see them; an input that is
written to gets its final value copied back at the end, for the same reason.
"""

import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from attnres_fx.passes.graph.aliasing import (
    aliased_argument,
    mutated_arguments,
    reshaped_in_place,
    returns_what_it_writes,
    written_as_one,
)
from attnres_fx.passes.graph.emit import emit, emit_switch
from attnres_fx.passes.graph.nodes import (
    computed_value,
    copy_call,
    insert_attribute,
    is_floating,
    nodes_without_gradients,
    same_shape,
    set_value,
    value_of,
)
from attnres_fx.passes.graph.operations import not_in_place, op_name, stops_gradient
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.normalize.attribute_writes import find_attribute_writes
from attnres_fx.passes.normalize.functional_form import (
    copied_value,
    functional_form,
    in_dtype_of,
    shows_all,
)
from attnres_fx.passes.normalize.row_writes import is_same_view, may_put_back, picks_by_tensor, put_back


def functionalize_mutations_pass(gm: GraphModule) -> PassResult:
    """Rewrite, in place, every write into an intermediate value or an input as a new value.

    Args:
        gm: A module with values on the nodes of its graph.

    Returns:
        The module, and the names of the writes that are no longer there.
    """
    pass_ = _Functionalizer(gm)
    changed = pass_.run()
    return PassResult(gm, bool(changed), (), tuple(changed))


class _Functionalizer:
    """Walks the graph once; arguments are original nodes until a node is placed, and current values after.

    Attributes:
        frozen: The nodes that run with gradients off.
        attributes: The parameters and buffers that are written to.
        here: The node that the walk has come to.
        same: The result of a write, and the tensor it wrote to.
        parent: A view, and what it is a view of.
        argument: A view, and the node that stands for its parent in its own arguments.
        base: A view, and the node that owns its storage.
        version: How often a storage was written to.
        current: A node, the version it was last seen at, and the node that holds its value there.
        epoch: How often an attribute was written to.
        snapshots: An attribute or a view of one, at an epoch, and the node that stands for what it holds then.
        inputs: The inputs of the graph that are written to, and whether a gradient may see a write, in their order.
        reset: Those of them whose data another tensor's took the place of, in another shape it may be.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.graph = gm.graph
        self.frozen = nodes_without_gradients(gm.graph)
        self.attributes = find_attribute_writes(gm.graph)
        self.here = next(iter(gm.graph.nodes))
        self.same: dict[Node, Node] = {n: f for n, f in self.attributes.first.items() if n is not f}
        self.parent: dict[Node, Node] = {}
        self.argument: dict[Node, Node] = {}
        self.base: dict[Node, Node] = {}
        self.version: dict[Node, int] = {}
        self.current: dict[Node, tuple[int, Node]] = {}
        self.epoch: Counter[Node] = Counter()
        self.snapshots: dict[tuple[Node, int], Node] = {}
        self.inputs: dict[Node, bool] = {}
        self.reset: set[Node] = set()

    def run(self) -> list[str]:
        nodes = list(self.graph.nodes)
        reshapes = any(reshaped_in_place(n) is not None for n in nodes)
        if not (self.attributes.elsewhere or self.attributes.first or reshapes):
            return []
        erased = [node for node in nodes if self._visit(node)]
        for node in reversed(erased):
            self.graph.erase_node(node)
        return [n.name for n in erased]

    def _visit(self, node: Node) -> bool:
        """Go on to a node; True where something else computes its value from now on."""
        self.here = node
        written = [self._tensor(n) for n in mutated_arguments(node)]
        if node.op == "output":
            self._copy_back(node)
        reshaped = reshaped_in_place(node)
        if reshaped is not None and not self._is_attribute(self._tensor(reshaped)):
            self._reshape(node, self._tensor(reshaped))
            return True
        if all(map(self._is_attribute, written)):
            self._place(node, written)
            return False
        for tensor in (n for n in written if self._base(n).op == "placeholder"):
            base, passed_by = self._base(tensor), node in self.frozen or self._is_detached(tensor)
            self.inputs[base] = self.inputs.get(base, False) or not passed_by
            if op_name(node) == "set_":
                self.reset.add(base)
        self._make_value(node, written)
        return True

    def _tensor(self, node: Node) -> Node:
        while node in self.same:
            node = self.same[node]
        return node

    def _base(self, node: Node) -> Node:
        return self.base.get(node, node)

    def _is_detached(self, node: Node) -> bool:
        return stops_gradient(node) or (node in self.parent and self._is_detached(self.parent[node]))

    def _is_attribute(self, node: Node) -> bool:
        return self._base(node).op == "get_attr"

    def _place(self, node: Node, written: list[Node]) -> None:
        """A node that writes to attributes or to nothing: let it see current values; note what it is a view of."""
        parent = aliased_argument(node)

        def seen(argument: Node) -> Node:
            tensor = self._tensor(argument)
            base = self._base(tensor)
            overwritten = self.epoch[base] > 0 or ((base, 0) in self.attributes.snapshots and base not in self.version)
            reads_snapshot = overwritten and parent is None and tensor not in written
            return self._snapshot(tensor) if reads_snapshot else self._value(tensor)

        with self.graph.inserting_before(node):
            node.args = map_arg(node.args, seen)
            node.kwargs = map_arg(node.kwargs, seen)
        if parent is not None:
            self._note_view(node, self._tensor(parent), self._now(parent))
        self.epoch.update({self._base(n) for n in written})
        if written and written_as_one(node) and returns_what_it_writes(node):
            self.same[node] = written[0]

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
        argument = self._value(self.parent[node])
        with self._gradients(node not in self.frozen):
            value = copy_call(node, {self.argument[node]: argument})
        self.current[node] = (version, value)
        return value

    def _snapshot(self, node: Node) -> Node:
        """What an attribute, or a view of it, holds until it is written to again, as a node of its own."""
        key = (node, self.epoch[self._base(node)])
        if key in self.snapshots:
            return self.snapshots[key]
        if node in self.parent:
            argument = self._snapshot(self.parent[node])
            with self._gradients(node not in self.frozen):
                self.snapshots[key] = copy_call(node, {self.argument[node]: argument})
        elif key in self.attributes.snapshots:
            self.snapshots[key] = self._cloned(node, node)
        else:
            self.snapshots[key] = insert_attribute(self.graph, str(node.target), like=node, value=value_of(node))
        return self.snapshots[key]

    @contextmanager
    def _gradients(self, wanted: bool) -> Iterator[None]:
        """Insert nodes that run with gradients on or off, whatever holds here."""
        if wanted == (self.here not in self.frozen):
            yield
            return
        before = emit_switch(self.graph, "is_grad_enabled", (), like=self.here)
        emit_switch(self.graph, "_set_grad_enabled", (wanted,), like=self.here)
        yield
        emit_switch(self.graph, "_set_grad_enabled", (before,), like=self.here)

    def _reshape(self, node: Node, tensor: Node) -> None:
        """From here on the tensor is a view of what it was."""
        with self.graph.inserting_before(node):
            value = self._value(tensor)
            args = map_arg(node.args, self._now)
            view = self._called(node, functional_form(node), args, map_arg(node.kwargs, self._now))
        self._note_view(view, tensor, value)
        self.same[node] = self.same[tensor] = view

    def _make_value(self, node: Node, written: list[Node]) -> None:
        with self.graph.inserting_before(node):
            functional, copied = functional_form(node), copied_value(node)
            has_value = functional is not None or copied is not None
            if has_value and written_as_one(node) and self._covers(written[0]) and not self._hides(written[0]):
                self._make_functional(node, functional, copied, written[0])
            elif not (written_as_one(node) and self._write_rows(node, functional, copied, written[0])):
                self._write_to_clones(node, written)
        if returns_what_it_writes(node):
            self.same[node] = written[0]

    def _hides(self, written: Node) -> bool:
        """Whether a write leaves the gradient of what was written before as it is, since gradients are off here."""
        base = self._base(written)
        return self.here in self.frozen and base not in self.frozen and is_floating(base)

    def _make_functional(self, node: Node, functional: Any, copied: Node | None, written: Node) -> None:
        base, value = self._base(written), self._new_value(node, functional, copied, self._value(written))
        self._advance(base, value if written is base else self._shaped_like(value, self._value(base)))
        self.current[written] = (self.version[base], value)

    def _new_value(self, node: Node, functional: Any, copied: Node | None, target: Node) -> Node:
        if copied is not None:
            return self._copy_of(self._now(copied), target)
        args, kwargs = not_in_place(node, map_arg(node.args, self._now), map_arg(node.kwargs, self._now))
        return in_dtype_of(self._called(node, functional, args, kwargs), target)

    def _write_rows(self, node: Node, functional: Any, copied: Node | None, written: Node) -> bool:
        """Write to some rows of a storage as a value of all of it; False where that is not known how."""
        if self._hides(written) or written in self.frozen or not may_put_back(written, self.parent):
            return False
        if node.target is operator.setitem and copied is None:
            value = self._assigned(node, written)
        elif copied is not None and is_same_view(self._tensor(copied), written, self.parent):
            return True  # Python writes back what it has just added to
        elif functional is not None or copied is not None:
            value = self._new_value(node, functional, copied, self._value(written))
        else:
            return False
        if value is None:
            return False
        base, view, whole = self._base(written), written, value
        while view is not base:
            before = self._value(self.parent[view])
            shown = shows_all(view, self.parent[view])
            whole = self._shaped_like(whole, before) if shown else put_back(view, before, whole, self.here)
            view = self.parent[view]
        self._advance(base, whole)
        self.current[written] = (self.version[base], value)
        return True

    def _assigned(self, node: Node, written: Node) -> Node | None:
        """What `written[index] = value` makes of `written`."""
        index, value = map_arg(node.args[1], self._now), node.args[2]
        target = self._value(written)
        if not isinstance(value, Node) or not is_floating(value):
            return None
        if picks_by_tensor(node) is not None:
            return emit(
                self.graph,
                "index_put",
                (target, [picks_by_tensor(node)], in_dtype_of(self._now(value), target)),
                like=node,
            )
        rows = self._called(node, operator.getitem, (target, index), {})
        if not may_put_back(rows, {rows: target}):
            self.graph.erase_node(rows)
            return None
        held = self._tensor(value)
        if self.parent.get(held) is written and held.target is operator.getitem and held.args[1] == index:
            return target  # Python writes back what it has just added to
        return put_back(rows, target, self._copy_of(self._now(value), rows), node)

    def _copy_of(self, value: Node, target: Node) -> Node:
        """A tensor of its own with a value, in the shape and dtype of what it is written to."""
        made = in_dtype_of(value, target)
        if not same_shape(made, target):
            value = made = emit(self.graph, "expand_as", (made, target), like=self.here)
        return self._cloned(made, self.here) if made is value else made

    def _write_to_clones(self, node: Node, written: list[Node]) -> None:
        """Let a write that has no functional form go to copies of the storages it writes into."""
        own = [n for n in written if not self._is_attribute(n)]
        before = {self._value(n): n for n in own}
        for base in dict.fromkeys(self._base(n) for n in own):
            self._advance(base, self._cloned(self._value(base), base))

        def now(seen: Node) -> Node:
            value = self._now(seen)
            return self._value(before[value]) if value in before else value

        result = self._called(node, node.target, map_arg(node.args, now), map_arg(node.kwargs, now))
        self.epoch.update({self._base(n) for n in written if n not in own})
        self.current[node] = (0, result)

    def _advance(self, base: Node, whole: Node) -> None:
        self.version[base] = self.version.get(base, 0) + 1
        self.current[base] = (self.version[base], whole)

    def _covers(self, written: Node) -> bool:
        """Whether a view shows all of its storage in order, so that a write to it is a write to all."""
        while written is not self._base(written):
            if not shows_all(written, self.parent[written]):
                return False
            written = self.parent[written]
        return True

    def _called(self, node: Node, target: Any, args: Any, kwargs: Any) -> Node:
        called = self.graph.create_node(node.op, target, args, kwargs)
        called.meta = dict(node.meta)
        value = computed_value(node.op, target, args, kwargs) if target is not node.target else None
        set_value(called, value, node)
        return called

    def _cloned(self, node: Node, owner: Node) -> Node:
        """A copy whose gradient goes on to the node, as the storage's own would."""
        with self._gradients(owner not in self.frozen):
            return emit(self.graph, "clone", (node,), like=node, value=value_of(node), dialect=self.here)

    def _shaped_like(self, value: Node, base: Node) -> Node:
        if same_shape(value, base):
            return value
        return emit(self.graph, "reshape_as", (value, base), like=base, value=value_of(base), dialect=value)

    def _copy_back(self, output: Node) -> None:
        with self.graph.inserting_before(output):
            for node, seen in self.inputs.items():
                value = self._value(node)
                if value is node:  # written with what it held
                    continue
                write = "set_" if node in self.reset else "copy_"
                with self._gradients(seen):
                    emit(self.graph, write, (node, value), like=node, value=value_of(node), dialect=value)
