"""What every pass needs of a graph: values, places in the user's source, and one way to insert nodes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.fx.proxy import _COPY_META_FIELDS

from attnres_fx.passes.graph.frames import frames_of
from attnres_fx.passes.graph.module_paths import module_path

_KEPT_META = {*_COPY_META_FIELDS, "stack_trace", "nn_module_stack", "source_fn_stack"}


def value_of(node: Node) -> Any:
    """What is known of a node's value: a fake tensor, a tuple of them, a symbolic number, or None."""
    meta = node.meta
    return meta["val"] if "val" in meta else meta.get("example_value")


def tensor_of(node: Node) -> torch.Tensor | None:
    """A node's value where it is a tensor; None for all other nodes."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: Node) -> tuple[Any, ...]:
    """Sizes of a node's tensor: plain numbers where they are known, symbols where they are free."""
    value = tensor_of(node)
    return tuple(map(plain_size, value.shape)) if value is not None else ()


def plain_size(size: Any) -> Any:
    """A size that a tracer held as a symbol until it turned out to have one value only."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return size if known is None else known


def same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes are tensors whose sizes are known to be equal."""
    left, right = tensor_of(a), tensor_of(b)
    return left is not None and right is not None and shapes_agree(tuple(left.shape), tuple(right.shape))


def shapes_agree(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal, without making a guard of it."""
    return len(left) == len(right) and all(sizes_agree(x, y) for x, y in zip(left, right, strict=True))


def sizes_agree(x: Any, y: Any) -> bool:
    """Whether two sizes are known to be equal, without making a guard of it."""
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    if isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt) and x.node.expr == y.node.expr:
        return True
    return bool(statically_known_true(x == y))


def same_row_sizes(before: Node, after: Node) -> bool:
    """Whether the last dimensions of two tensors are known to be equal."""
    x, y = shape_of(before), shape_of(after)
    return bool(x) and bool(y) and sizes_agree(x[-1], y[-1])


def source_line(node: Node) -> str:
    """`file:line` of the user's code that made a node, torch's aside; `""` where the tracer kept no stack."""
    frames = frames_of(node)
    return str(frames[-1]) if frames else ""


def describe(node: Node) -> str:
    """A node as errors and reports name it: its name, module path and source line."""
    path, line = module_path(node), source_line(node)
    return f"{node.name}" + (f" in {path}" if path else "") + (f" ({line})" if line else "")


def copy_meta(target: Node, like: Node) -> None:
    """Give a node what another knows of its place in the user's source, and whether backward recomputes it."""
    target.meta.update({k: v for k, v in like.meta.items() if k in _KEPT_META})
    if "recompute" in like.meta:
        target.meta.update({k: like.meta[k] for k in ("recompute", "ac_graph_id") if k in like.meta})


def insert_call(
    graph: Graph, target: Callable[..., Any], args: tuple[Any, ...], *, like: Node, value: Any, name: str = ""
) -> Node:
    """Insert one call at the graph's insertion point.

    Args:
        graph: The graph to write into.
        target: The function that is called.
        args: Its arguments: nodes, numbers, lists of them.
        like: The node whose metadata the new one gets.
        value: The value it has; None leaves it without one.
        name: The name it should get; by default that of the function.

    Returns:
        The new node.
    """
    node = graph.create_node("call_function", target, args, name=name or None)
    copy_meta(node, like)
    set_value(node, value, like)
    return node


def insert_attribute(graph: Graph, target: str, *, like: Node, value: torch.Tensor) -> Node:
    """Insert, at the graph's insertion point, a node that gets the attribute at the path `target`."""
    node = graph.create_node("get_attr", target)
    copy_meta(node, like)
    set_value(node, value, like)
    return node


def set_value(node: Node, value: Any, like: Node) -> None:
    """Note the value of a node under the name that the tracer of another used; None leaves it without one."""
    if value is not None:
        node.meta["example_value" if "example_value" in like.meta and "val" not in like.meta else "val"] = value


def copy_call(node: Node, replace: dict[Node, Node], *, value: Any = None) -> Node:
    """Insert a copy of a call with some of its arguments replaced, metadata and all."""
    copied = node.graph.node_copy(node, lambda n: replace.get(n, n))
    copied.meta = dict(node.meta)
    if value is not None:
        set_value(copied, value, node)
    return copied


def fake_like(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor like `value` in another dtype, in the same fake mode."""
    if value.dtype == dtype:
        return value
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return value.to(dtype)
    with mode:
        return torch.empty_like(value, dtype=dtype)


def fake_parameter(value: torch.Tensor, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor of a size and dtype on the device of `value`, in the same fake mode."""
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return torch.empty(size, dtype=dtype, device=value.device)
    with mode:
        return torch.empty(size, dtype=dtype, device=value.device)


def computed_value(op: str, target: Any, args: Any, kwargs: Any) -> Any:
    """The value that a call would have on the values of its arguments, without new guards.

    Args:
        op: `"call_function"` or `"call_method"`, as in `torch.fx`.
        target: The function, or the name of the method.
        args, kwargs: Its arguments, nodes among them.

    Returns:
        The value; None where the call fails.
    """
    known = [v for n in _nodes_in((args, kwargs)) if (v := value_of(n)) is not None]
    mode = next((m for v in known if (m := getattr(v, "fake_mode", None)) is not None), None)

    def value(node: Node) -> Any:
        held = value_of(node)
        real = mode is not None and isinstance(held, torch.Tensor) and getattr(held, "fake_mode", None) is None
        return mode.from_tensor(held, static_shapes=True) if real and mode is not None else held

    silent = mode.shape_env.suppress_guards() if mode is not None and mode.shape_env else contextlib.nullcontext()
    with mode or contextlib.nullcontext(), silent, torch.no_grad():
        try:
            given, named = map_arg(args, value), map_arg(kwargs, value)
            return getattr(given[0], target)(*given[1:], **named) if op == "call_method" else target(*given, **named)
        except Exception:  # whatever the operation raises on values without data
            return None


def _nodes_in(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(arguments, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def has_values(gm: GraphModule) -> bool:
    """Whether every placeholder and call of a graph carries a value."""
    return all(
        "val" in n.meta or "example_value" in n.meta
        for n in gm.graph.nodes
        if n.op not in ("output", "get_attr", "root") and not (n.op == "placeholder" and n.type is None and not n.users)
    )


def nodes_with_bodies(gm: GraphModule) -> Iterator[Node]:
    """The nodes of a graph and of the bodies it calls."""
    for node in gm.graph.nodes:
        yield node
        if (body := body_of(node, gm)) is not None:
            yield from nodes_with_bodies(body)


def body_of(node: Any, gm: Any) -> GraphModule | None:
    """The graph that a node of a module gets as an attribute, to hand it on as a body."""
    if not (isinstance(node, Node) and node.op == "get_attr") or gm is None:
        return None
    try:
        found = attrgetter(str(node.target))(gm)
    except AttributeError:
        return None
    return found if isinstance(found, GraphModule) else None


def nodes_without_gradients(graph: Graph) -> frozenset[Node]:
    """The nodes that run where `torch._C._set_grad_enabled(False)` holds."""
    enabled = True
    found: dict[Node, bool] = {}
    off = set()
    for node in graph.nodes:
        if node.target is torch.is_grad_enabled:
            found[node] = enabled
        elif node.target is torch._C._set_grad_enabled:
            wanted = node.args[0]
            enabled = found.get(wanted, True) if isinstance(wanted, Node) else bool(wanted)
        elif not enabled:
            off.add(node)
    return frozenset(off)


def is_floating(node: Node) -> bool:
    """Whether a node is a floating tensor with at least one dimension."""
    value = tensor_of(node)
    return value is not None and value.is_floating_point() and value.dim() >= 1


def argument_of(node: Node, position: int, name: str) -> Any:
    """An argument of a call, given by position or by name; None where it is not given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
