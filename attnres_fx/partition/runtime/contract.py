"""What the runtime needs of stages and of a plan, and no more."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnres_fx.partition.split.routes import StageRoute

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Value(Protocol):
    """A tensor that leaves the virtual stage it is made in."""

    @property
    def name(self) -> str: ...
    @property
    def differentiable(self) -> bool: ...


class Stage(Protocol):
    """One virtual stage: an `nn.Module` with its own parameters, under their original names.

    route: which values it takes and makes. inputs: which of the model's flat inputs it takes.

    Called with the values of `route.takes` and then those flat inputs, all positional. Returns a tuple (or list) of
    the values of `route.produced`; the last stage returns the model's flat outputs. `train()` and `eval()` choose
    its graph.
    """

    @property
    def route(self) -> StageRoute: ...
    @property
    def inputs(self) -> tuple[int, ...]: ...
    def __call__(self, *args: Any) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def modules(self) -> Iterator[nn.Module]: ...


class Stages(Protocol):
    """Stages of one model: all virtual stages, or at least this rank's.

    What is said of values, and the routes of the stages, is of the current mode. values: every tensor that leaves a
    stage. num_stages, virtual_stages: P ranks with V virtual stages each.
    tied: groups of (virtual stage, parameter name) that are one parameter in the model; the first is the owner.
    """

    @property
    def values(self) -> Sequence[Value]: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def virtual_stages(self) -> int: ...
    @property
    def tied(self) -> Sequence[Sequence[tuple[int, str]]]: ...
    def __iter__(self) -> Iterator[Stage]: ...

    def train(self, mode: bool = True) -> Any:
        """Choose the train or the eval graph of all stages."""

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """The model's flat inputs, from the arguments of one microbatch."""

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's own output structure, from its flat outputs."""

    def shapes(self, flat_inputs: Sequence[Any]) -> Shapes:
        """Shape and dtype of every value for a microbatch with these flat inputs."""


class Plan(Protocol):
    """The part of a plan that the runtime reads. schedule: torch's name of it."""

    @property
    def num_stages(self) -> int: ...
    @property
    def virtual_stages(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def num_microbatches(self) -> int: ...


def shape_of(value: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype, as `Stages.shapes` gives them."""
    return tuple(value.shape), value.dtype
