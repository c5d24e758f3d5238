"""What an optimizer is given of a model with depth attention."""

from typing import Any

from torch import nn

from attnres_fx.errors import ArgumentError


def parameter_groups(
    model: nn.Module, *, lr: float | None = None, query_lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Two optimizer groups: the model's own parameters, and what a conversion adds, without weight decay.

    Args:
        model: A module with `attnres` parameters, or an original, whose second group is empty.
        lr: Learning rate of the model's own parameters; by default the optimizer's.
        query_lr: That of what a conversion adds: queries, gains, gates and biases; by default the same as `lr`.
        weight_decay: Of the model's own parameters; by default the optimizer's.

    Returns:
        Groups for a `torch.optim` optimizer.

    Raises:
        ArgumentError: There is a `query_lr`, and the model has no queries.
    """
    named = list(model.named_parameters())
    added = [p for n, p in named if "attnres" in n.split(".")]
    if query_lr is not None and not added:
        raise ArgumentError(
            f"query_lr={query_lr} is for queries, gains and gates, and this {type(model).__name__} has none: "
            f"convert or attach it first, or leave query_lr out."
        )
    own: dict[str, Any] = {"params": [p for n, p in named if "attnres" not in n.split(".")]}
    groups = [own, {"params": added, "weight_decay": 0.0}]
    for group, rate in zip(groups, (lr, lr if query_lr is None else query_lr), strict=True):
        if rate is not None:
            group["lr"] = rate
    if weight_decay is not None:
        own["weight_decay"] = weight_decay
    return groups
