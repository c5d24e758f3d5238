"""The arguments of an example at other sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnres_fx.capture.signature import InputShape


def free_places(shapes: Sequence[InputShape | None]) -> dict[str, str]:
    """By symbol, the first dimension that it is the size of, in words."""
    places: dict[str, str] = {}
    for shape in shapes:
        for d, size in enumerate(shape.sizes if shape is not None else ()):
            if shape is not None and isinstance(size, str):
                places.setdefault(size, f"dimension {d} of {shape.name!r}")
    return places


def with_sizes(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Sequence[InputShape | None], sizes: Mapping[str, int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with all dimensions of these symbols cut, or repeated, to these sizes together."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    known: dict[int, Any] = {}  # a tensor that is given twice stays one
    for leaf, shape in zip(leaves, shapes, strict=True):
        if id(leaf) not in known:
            known[id(leaf)] = _resized(leaf, shape, sizes)
    changed = [known[id(leaf)] for leaf in leaves]
    result: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(changed, spec)
    return result


def _resized(leaf: Any, shape: InputShape | None, sizes: Mapping[str, int]) -> Any:
    if shape is None or not isinstance(leaf, Tensor):
        return leaf
    contiguous = leaf.is_contiguous()
    for d, symbol in enumerate(shape.sizes):
        wanted = sizes.get(symbol, leaf.shape[d]) if isinstance(symbol, str) else leaf.shape[d]
        while leaf.shape[d] < wanted:
            leaf = torch.cat([leaf, leaf.narrow(d, 0, min(leaf.shape[d], wanted - leaf.shape[d]))], d)
        leaf = leaf.narrow(d, 0, wanted)
    return leaf.contiguous() if contiguous else leaf
