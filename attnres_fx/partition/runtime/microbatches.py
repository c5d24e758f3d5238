"""One batch as microbatches, and a mean loss as the sum of theirs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnres_fx.errors import PipelineError


@dataclass(frozen=True)
class Microbatches:
    """Microbatches of one batch.

    Attributes:
        arguments: args and kwargs of each.
        targets: The target of each; None where no target was given.
        counts: Target elements of each that are not ignored, float64 [number].
    """

    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    targets: tuple[Any, ...] | None
    counts: Tensor

    def __len__(self) -> int:
        return len(self.arguments)


def split_batch(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    target: Any,
    number: int,
    *,
    ignore_index: int,
    device: torch.device,
    shared: Collection[int] = (),
) -> Microbatches:
    """A batch in `number` equal parts along dimension 0 of every tensor.

    Tensors with one row or no dimension, those that all rows share, and arguments that are no tensors go whole to every
    part. The batch is as long as the first of the others.

    Args:
        args: Positional arguments of the model for the whole batch.
        kwargs: Keyword arguments.
        target: A tensor, or any structure of tensors, or None.
        number: Of microbatches.
        ignore_index: Elements of an integer target that do not count.
        device: Where all tensors go.
        shared: The ids of tensors that all rows share, however long they are.

    Raises:
        PipelineError: The batch cannot be divided, or another tensor has another number of rows.
    """
    paths, tree = pytree.tree_flatten_with_path((tuple(args), dict(kwargs), target))
    whole = [id(leaf) in shared for _, leaf in paths]
    leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for _, leaf in paths]
    lengths = [len(x) for x, w in zip(leaves, whole, strict=True) if isinstance(x, Tensor) and x.ndim and not w]
    rows = next((n for n in lengths if n > 1), 1)
    if rows % number:
        raise PipelineError(
            f"a batch of {rows} rows does not divide into num_microbatches={number}: give a multiple of {number} "
            f"rows, or plan with another num_microbatches."
        )

    def part(place: int, index: int) -> Any:
        leaf = leaves[place]
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or whole[place] or (len(leaf) == 1 and number > 1):
            return leaf
        if len(leaf) != rows:
            raise PipelineError(
                f"{_place(paths[place][0])} of shape {tuple(leaf.shape)} was given in a batch of {rows} rows: the "
                f"first dimension of every argument and of the target must be the batch's, or 1 for what every row "
                f"shares."
            )
        size = rows // number
        return leaf[index * size : (index + 1) * size]

    parts = [pytree.tree_unflatten([part(p, i) for p in range(len(leaves))], tree) for i in range(number)]
    return Microbatches(
        arguments=tuple((a, k) for a, k, _ in parts),
        targets=None if target is None else tuple(t for _, _, t in parts),
        counts=torch.stack([_num_targets(t, ignore_index, device) for _, _, t in parts]),
    )


def _place(path: tuple[Any, ...]) -> str:
    """What a tensor of (args, kwargs, target) is, in words."""
    kind = ("argument", "argument", "target")[path[0].idx]
    named = [str(getattr(path[1], "key", getattr(path[1], "idx", "")))] if kind == "argument" else []
    return " ".join(["the", kind, *named]) + pytree.keystr(path[1 + len(named) :])


def _num_targets(target: Any, ignore_index: int, device: torch.device) -> Tensor:
    """Elements that the loss of a target is the mean over; without a target every microbatch counts the same."""
    tensors = [t for t in pytree.tree_leaves(target) if isinstance(t, Tensor)]
    if not tensors:
        return torch.ones((), dtype=torch.float64, device=device)
    first = tensors[0]
    if first.is_floating_point():
        return torch.tensor(float(first.numel()), dtype=torch.float64, device=device)
    return (first != ignore_index).sum().double()


class MeanLoss:
    """The loss of microbatches, each weighted by its share of all elements: their sum is the whole batch's mean.

    A microbatch in which everything is ignored has no weight.
    """

    def __init__(
        self, loss_fn: Callable[[Any, Any], Tensor], unflatten: Callable[[Sequence[Any]], Any], replicas: int = 1
    ) -> None:
        """A mean loss.

        Args:
            loss_fn: (model output, target) -> scalar, the mean over the elements of the target that are not ignored.
            unflatten: The model's output structure from its flat outputs.
            replicas: Over how many copies of the model the gradients are averaged afterwards.
        """
        self.loss_fn, self.unflatten, self.replicas = loss_fn, unflatten, replicas
        self._targets: tuple[Any, ...] | None = None
        self._shares: list[float] = []
        self.value: Tensor | None = None

    def start(self, batches: Microbatches, total: Tensor) -> None:
        """Begin a step. total: elements of the whole batch, over all replicas."""
        self._targets, self.value = batches.targets, None
        self._shares = (batches.counts / total.clamp(min=1)).tolist()

    def clear(self) -> None:
        """Release the targets."""
        self._targets, self.value = None, None

    def __call__(self, outputs: Sequence[Any], index: int) -> Tensor:
        """Loss of one microbatch, scaled for backward; `value` sums up the loss that is reported."""
        share = self._shares[index]
        if share == 0:
            return _zero_loss(outputs)
        loss = self.loss_fn(self.unflatten(outputs), None if self._targets is None else self._targets[index])
        reported = loss.detach().double() * share
        self.value = reported if self.value is None else self.value + reported
        return loss * (share * self.replicas)


def _zero_loss(outputs: Sequence[Any]) -> Tensor:
    """A loss whose gradients are zeros."""
    parts = [(o * 0).sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    return torch.stack([p.float() for p in parts]).sum() if parts else torch.zeros(())


def join_outputs(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Flat outputs of all microbatches as one batch's: rows after rows, scalars stacked, the rest from the first."""

    def join(column: tuple[Any, ...]) -> Any:
        if not isinstance(column[0], Tensor):
            return column[0]
        return torch.cat(column) if column[0].ndim else torch.stack(column)

    return [join(column) for column in zip(*parts, strict=True)]
