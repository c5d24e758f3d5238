"""What one virtual stage takes and gives in a step, before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnres_fx.partition.runtime.source_cache import SourceCache
from attnres_fx.partition.split.routes import StageRoute

#: Shape and dtype of every value that travels, by its name.
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class StageSpec:
    """Routes, shapes and cache of one virtual stage in one step; train and eval graphs may differ in all of them.

    Attributes:
        route: The values it takes, makes, receives and sends.
        inputs: Which of the model's flat inputs it takes.
        differentiable: Values whose gradients travel.
        shapes: Of all values of the model, for one microbatch.
        cache: Shared by the stages of a rank, or its own.
        last_user: Whether no later stage of its rank uses the cache in a forward pass.
    """

    route: StageRoute
    inputs: tuple[int, ...]
    differentiable: frozenset[str]
    shapes: Shapes
    cache: SourceCache
    last_user: bool

    @property
    def bwd_recv(self) -> tuple[str, ...]:
        """Values whose gradients arrive from the next stage."""
        return tuple(n for n in self.route.sent if n in self.differentiable)

    @property
    def bwd_send(self) -> tuple[str, ...]:
        """Values whose gradients are sent to the previous stage."""
        return tuple(n for n in self.route.received if n in self.differentiable)


def shape_of(value: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype, as `Stages.shapes` gives them."""
    return tuple(value.shape), value.dtype
