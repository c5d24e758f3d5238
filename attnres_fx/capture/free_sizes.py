"""Which sizes of a model's arguments a capture leaves free."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.errors import ArgumentError


def free_dimensions(leaves: Sequence[Any], limit: int) -> dict[int, tuple[int, ...]]:
    """The leading dimensions of each tensor, and later ones of a size that a sequence has (masks).

    Args:
        leaves: Flat arguments.
        limit: How many leading dimensions; 1 leaves later ones fixed too.

    Returns:
        By the index of a leaf, its free dimensions. A size of 1 is never free: it may broadcast.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    lengths = {t.shape[1] for t in tensors if 1 < t.dim() <= 3 and t.shape[1] > 1}
    free: dict[int, tuple[int, ...]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            free[i] = tuple(
                d
                for d, size in enumerate(leaf.shape)
                if size > 1 and (d < limit or (limit > 1 and leaf.dim() > 3 and size in lengths))
            )
    return free


def with_two_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with its batch of one doubled, so that the batch can be free; other examples as they are.

    A batch of one is a leading size of 1 in every argument of two dimensions or more. Beside a larger batch a leading
    1 broadcasts, and stays.
    """
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 1]
    if not leaves or any(x.shape[0] != 1 for x in leaves):
        return args, kwargs

    def doubled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != 1:
            return leaf
        if id(leaf) not in known:  # a tensor that is given twice stays one
            known[id(leaf)] = torch.cat([leaf.detach(), leaf.detach()]).requires_grad_(leaf.requires_grad)
        return known[id(leaf)]

    known: dict[int, Tensor] = {}
    result: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(doubled, (args, kwargs))
    return result


def marked_dimensions(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> dict[int, tuple[int, ...]]:
    """The dimensions that `dynamic_shapes` leaves free.

    Args:
        model: The model, whose forward names the arguments.
        args: Example arguments by position.
        kwargs: Example arguments by keyword.
        dynamic_shapes: As `torch.export.export` takes them: a dict by argument name, or a sequence in order; for each
            tensor None, or a dict or sequence of None, int or Dim by dimension.

    Returns:
        By the index of the argument's leaf.

    Raises:
        ArgumentError: They do not fit the arguments.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(dynamic_shapes, Mapping):
        unknown = set(dynamic_shapes) - {*names[: len(args)], *kwargs}
        if unknown:
            raise ArgumentError(
                f"dynamic_shapes names {', '.join(sorted(unknown))}, which is no argument of this call."
            )
        by_position = tuple(dynamic_shapes.get(n) for n in names[: len(args)])
        by_name = {n: dynamic_shapes.get(n) for n in kwargs}
    else:
        given = tuple(dynamic_shapes)
        if len(given) > len(args) + len(kwargs):
            raise ArgumentError(
                f"dynamic_shapes has {len(given)} entries where the call has {len(args) + len(kwargs)} arguments."
            )
        by_position, by_name = given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=False))
    free: dict[int, tuple[int, ...]] = {}
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    whole = (tuple(by_position), {n: by_name.get(n) for n in kwargs})
    for i, (leaf, wanted) in enumerate(zip(leaves, _broadcast(whole, spec), strict=True)):
        if isinstance(leaf, Tensor) and wanted:
            pairs = wanted.items() if isinstance(wanted, Mapping) else enumerate(wanted)
            free[i] = tuple(d for d, size in pairs if _is_free(size))
    return free


def _is_free(size: Any) -> bool:
    kind = getattr(getattr(size, "type", None), "name", "")  # of Dim.AUTO, Dim.DYNAMIC, Dim.STATIC
    return size is not None and not isinstance(size, int) and kind != "STATIC"


def _broadcast(shapes: Any, spec: Any) -> list[Any]:
    """One entry for each leaf of a structure; None stands for everything below it."""
    if spec.is_leaf():
        return [shapes]
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    if shapes is None:
        return [None] * spec.num_leaves
    if isinstance(shapes, Mapping):
        keys = list(spec.context) if spec.context is not None else list(shapes)
        parts = [shapes.get(k) for k in keys]
    else:
        parts = list(shapes)
    if len(parts) != len(children):
        raise ArgumentError(f"dynamic_shapes has {len(parts)} entries where the arguments have {len(children)}.")
    return [leaf for part, child in zip(parts, children, strict=True) for leaf in _broadcast(part, child)]
