"""One batch as microbatches, and a mean loss as the sum of theirs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnres_fx.errors import PipelineError


@dataclass(frozen=True)
class Microbatches:
    """arguments: args and kwargs of each. targets: of each, or None. counts: target elements that are not ignored."""

    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    targets: tuple[Any, ...] | None
    counts: Tensor

    def __len__(self) -> int:
        return len(self.arguments)


def split_batch(
    args: Sequence[Any], kwargs: Mapping[str, Any], target: Any, number: int, *, ignore_index: int, device: torch.device
) -> Microbatches:
    """A batch in `number` equal parts along dimension 0 of every tensor that has the batch there.

    Tensors with one row or none, and what is no tensor, go whole to every part. The batch is as long as the first
    tensor that has more than one row. Raises PipelineError where it cannot be divided, or another tensor differs.
    """
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs), target))
    leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    lengths = [len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    rows = next((n for n in lengths if n > 1), 1)
    if rows % number:
        raise PipelineError(
            f"a batch of {rows} rows does not divide into num_microbatches={number}: give a multiple of {number} "
            f"rows, or plan with another num_microbatches."
        )

    def part(leaf: Any, index: int) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or (len(leaf) == 1 and number > 1):
            return leaf
        if len(leaf) != rows:
            raise PipelineError(
                f"a tensor of shape {tuple(leaf.shape)} was given in a batch of {rows} rows: the first dimension of "
                f"every argument and of the target must be the batch's, or 1 for what every row shares."
            )
        size = rows // number
        return leaf[index * size : (index + 1) * size]

    parts = [pytree.tree_unflatten([part(leaf, i) for leaf in leaves], tree) for i in range(number)]
    return Microbatches(
        arguments=tuple((a, k) for a, k, _ in parts),
        targets=None if target is None else tuple(t for _, _, t in parts),
        counts=torch.stack([_counted(t, ignore_index, device) for _, _, t in parts]),
    )


def _counted(target: Any, ignore_index: int, device: torch.device) -> Tensor:
    """Elements of a target that its loss is the mean over; without a target every microbatch counts alike."""
    tensors = [t for t in pytree.tree_leaves(target) if isinstance(t, Tensor)]
    if not tensors:
        return torch.ones((), dtype=torch.float64, device=device)
    first = tensors[0]
    if first.is_floating_point():
        return torch.tensor(float(first.numel()), dtype=torch.float64, device=device)
    return (first != ignore_index).sum().double()


class MeanLoss:
    """Weighs each microbatch's mean loss by its share of all elements, so that their sum is the whole batch's mean.

    loss_fn: (model output, target) -> mean over the elements of the target that are not ignored. replicas: over how
    many the gradients will be averaged afterwards. A microbatch in which everything is ignored counts nothing.
    """

    def __init__(
        self, loss_fn: Callable[[Any, Any], Tensor], unflatten: Callable[[Sequence[Any]], Any], replicas: int = 1
    ) -> None:
        self.loss_fn, self.unflatten, self.replicas = loss_fn, unflatten, replicas
        self._targets: tuple[Any, ...] | None = None
        self._shares: list[float] = []
        self.value: Tensor | None = None

    def start(self, batches: Microbatches, total: Tensor) -> None:
        """A new step. total: elements of the whole batch, over all replicas."""
        self._targets, self.value = batches.targets, None
        self._shares = (batches.counts / total.clamp(min=1)).tolist()

    def clear(self) -> None:
        """Let go of the targets."""
        self._targets, self.value = None, None

    def __call__(self, outputs: Sequence[Any], index: int) -> Tensor:
        """Loss of one microbatch as backward wants it; `value` gathers what is reported."""
        share = self._shares[index]
        if share == 0:
            return _nothing(outputs)
        loss = self.loss_fn(self.unflatten(outputs), None if self._targets is None else self._targets[index])
        reported = loss.detach().double() * share
        self.value = reported if self.value is None else self.value + reported
        return loss * (share * self.replicas)


def _nothing(outputs: Sequence[Any]) -> Tensor:
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
