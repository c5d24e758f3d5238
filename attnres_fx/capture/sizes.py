"""Which sizes of a model's arguments are free, and which of them a captured graph holds for."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.export._unlift import GuardsFn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from attnres_fx.capture.isolated_run import Mode, run_untouched
from attnres_fx.capture.signature import InputShape, dtype_kind
from attnres_fx.passes.graph.copying import copy_graph
from attnres_fx.passes.graph.nodes import plain_size

#: Called with the flat inputs of a graph; raises AssertionError where it does not hold for their sizes.
Guards = Callable[..., None]


def free_sizes(model: nn.Module, args: Any, kwargs: Any, limit: int) -> Any:
    """Which sizes of an example are free, where nobody says.

    Args:
        model: what will be called.
        args: example arguments by position.
        kwargs: example arguments by keyword.
        limit: how many leading dimensions of each tensor.

    Returns:
        `Dim.AUTO` for leading dimensions, and for later ones of a size that a sequence has (masks), in the form that
        `torch.export.export` takes as `dynamic_shapes`; None where no size is free.
    """
    lengths = {
        leaf.shape[1]
        for leaf in pytree.tree_leaves((args, kwargs))
        if isinstance(leaf, Tensor) and 1 < leaf.dim() <= 3 and leaf.shape[1] > 1
    }

    def sizes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        free = {
            i: Dim.AUTO
            for i, size in enumerate(leaf.shape)
            if size > 1 and (i < limit or (limit > 1 and leaf.dim() > 3 and size in lengths))
        }
        return free or None

    names = _forward_names(model, len(args))
    by_name = {n: pytree.tree_map(sizes, v) for n, v in zip(names, args, strict=True)}
    by_name |= {n: pytree.tree_map(sizes, v) for n, v in kwargs.items()}
    if not any(isinstance(leaf, type(Dim.AUTO)) for leaf in pytree.tree_leaves(by_name)):
        return None
    if len(by_name) > len(names) + len(kwargs) or any(n.startswith("*") for n in names):
        return None
    return by_name


def _forward_names(model: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY)]
    return names[:count] if len(names) >= count else names + ["*"] * (count - len(names))


def without_ones(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The example with its sizes of 1 doubled: a capture would freeze a size of 1.

    Args:
        model: what is run.
        args: example arguments by position.
        kwargs: example arguments by keyword.

    Returns:
        args and kwargs with the first two dimensions doubled where they are 1, or the first alone; as they were where
        the outputs of the first half do not stay what they were.
    """
    for limit in (2, 1):
        doubled = pytree.tree_map(lambda leaf, limit=limit: _doubled(leaf, limit), (args, kwargs))
        pairs = zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(doubled), strict=True)
        if all(a is b for a, b in pairs):
            return args, kwargs
        try:
            before = pytree.tree_leaves(run_untouched(model, args, kwargs, "eval"))
            after = pytree.tree_leaves(run_untouched(model, doubled[0], doubled[1], "eval"))
        except Exception:
            continue
        if len(before) == len(after) and all(map(_is_first_half, before, after)):
            return doubled  # type: ignore[no-any-return]
    return args, kwargs


def _doubled(leaf: Any, limit: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dim() < 2:
        return leaf
    for i in range(min(limit, leaf.dim())):
        if leaf.shape[i] == 1:
            leaf = torch.cat([leaf, leaf], i)
    return leaf


def _is_first_half(before: Any, after: Any) -> bool:
    if not isinstance(before, Tensor):
        return bool(before == after)
    if not isinstance(after, Tensor) or before.dim() != after.dim() or before.is_meta:
        return False
    for i, size in enumerate(before.shape):
        after = after.narrow(i, 0, min(size, after.shape[i]))
    if before.shape != after.shape:
        return False
    tolerance = 1e-4 if before.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(before.double(), after.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def sizes_of(bounds: Any) -> tuple[int, int | None]:
    """The least and the greatest size of a symbol, None where there is no greatest.

    Args:
        bounds: of an export's range constraints. A lower bound of 2 only says that the tracer set 0 and 1 apart.
    """
    low = int(bounds.lower)
    high = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**31 else None
    return (0 if low == 2 else low), high


def input_shapes(gm: GraphModule) -> tuple[InputShape | None, ...]:
    """The shape of each input of a graph, None where it is no tensor."""
    shapes: list[InputShape | None] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            shapes.append(None)
            continue
        sizes = tuple(s if isinstance(s, int) else str(s) for s in map(plain_size, value.shape))
        shapes.append(InputShape(str(node.target), sizes, dtype_kind(value)))
    return tuple(shapes)


def take_guards(gm: GraphModule) -> Guards | None:
    """Take out of an exported graph the call that checks its inputs.

    Returns:
        What was called, None where there is no such call. It knows what the tracer took for granted of the sizes:
        that one is even, or smaller than another.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and isinstance(guards := gm.get_submodule(str(node.target)), GuardsFn):
            gm.graph.erase_node(node)
            gm.delete_submodule(str(node.target))
            gm.recompile()
            return guards.forward
    return None


def refused_ones(
    model: nn.Module, gm: GraphModule, shapes: Sequence[InputShape | None], args: Any, kwargs: Any, mode: Mode
) -> dict[str, str]:
    """Symbols of a fresh capture that must not be 1.

    Tracers set 0 and 1 apart from other sizes, so a graph made at 2 or more may compute something else at 1:
    both are run there once and compared.

    Args:
        model: what was captured.
        gm: its graph, with flat inputs and outputs.
        shapes: of the graph's inputs.
        args: example arguments by position.
        kwargs: example arguments by keyword.
        mode: of the graph.

    Returns:
        By symbol, the dimension it is the size of, in words.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [*(x for x in leaves if isinstance(x, Tensor)), *model.parameters()]
    if any(t.is_meta or isinstance(t, FakeTensor) for t in tensors) or len(leaves) != len(shapes):
        return {}
    bare = GraphModule(gm, copy_graph(gm.graph))  # without the hooks that export puts on its modules
    refused = {}
    for symbol, place in _places_of_symbols(shapes).items():
        cut = [_cut_to_one(leaf, shape, symbol) for leaf, shape in zip(leaves, shapes, strict=True)]
        if not _agree(model, bare, cut, spec, mode):
            refused[symbol] = place
    return refused


def _places_of_symbols(shapes: Sequence[InputShape | None]) -> dict[str, str]:
    """The first dimension that each symbol is the size of, in words."""
    places: dict[str, str] = {}
    for shape in shapes:
        for i, size in enumerate(shape.sizes if shape is not None else ()):
            if shape is not None and isinstance(size, str):
                places.setdefault(size, f"dimension {i} of {shape.name!r}")
    return places


def _agree(model: nn.Module, graph: GraphModule, leaves: list[Any], spec: Any, mode: Mode) -> bool:
    """Whether a model and its flat graph return the same for the same inputs."""
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    try:
        expected = pytree.tree_leaves(run_untouched(model, args, kwargs, mode))
        actual = pytree.tree_leaves(run_untouched(graph, leaves, {}, mode))
        return len(expected) == len(actual) and all(map(_is_same, expected, actual))
    except Exception:  # whatever either raises: the graph was not shown to hold
        return False


def _cut_to_one(leaf: Any, shape: InputShape | None, symbol: str) -> Any:
    if shape is None or not isinstance(leaf, Tensor):
        return leaf
    for i, size in enumerate(shape.sizes):
        if size == symbol:
            leaf = leaf.narrow(i, 0, 1)
    return leaf


def _is_same(expected: Any, actual: Any) -> bool:
    if not isinstance(expected, Tensor):
        return bool(expected == actual)
    return isinstance(actual, Tensor) and expected.shape == actual.shape and _is_first_half(expected, actual)
