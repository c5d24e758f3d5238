"""What `convert` was called with: for the mode that it left for later, and for a pickle, which converts again."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.config import RewriteConfig
from attnres_fx.conversion.conversion import Placement, placement_of
from attnres_fx.conversion.verify import Check
from attnres_fx.passes import Lowering


@dataclass(frozen=True, eq=False)
class ConversionCall:
    """The arguments of a conversion.

    Attributes:
        args: Of the example, by position.
        kwargs: Of the example, by keyword, with those that the capture bound.
        config: Variant, blocks and output mode.
        dynamic_shapes: Which sizes are free.
        check: What was compared.
        lowering: What is folded into the reads.
        placement: Device and dtype of the model then.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    config: RewriteConfig
    dynamic_shapes: Any
    check: Check
    lowering: Lowering
    placement: Placement | None

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a copy of the model was converted by the same call

    def for_model(self, model: nn.Module) -> Self:
        """The same call on a model that was moved or cast since."""
        args, kwargs = self.example_for(model)
        return replace(self, args=args, kwargs=kwargs, placement=placement_of(model))

    def example_for(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example's arguments, where and in the dtype in which the model is now."""
        now, before = placement_of(model), self.placement
        if now is None or before is None or now == before:
            return self.args, self.kwargs

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            device = now[0] if leaf.device == before[0] else leaf.device
            dtype = now[1] if leaf.dtype == before[1] else leaf.dtype
            if leaf.is_meta and device.type != "meta":  # it never had values
                return torch.zeros(leaf.shape, dtype=dtype, device=device)
            return leaf.to(device, dtype)

        placed: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(moved, (self.args, self.kwargs))
        return placed
