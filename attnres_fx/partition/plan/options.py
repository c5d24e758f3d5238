"""What a plan was asked for: its options, and the example microbatch as data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnres_fx.partition.checked_values import checked_choice, checked_count, checked_flag, checked_index
from attnres_fx.partition.pipeline_schedule import check_schedule


@dataclass(frozen=True)
class InputSpec:
    """One argument of the example microbatch.

    Args:
        name: Its keyword, or its number among the positional ones.
        dtype: Of a tensor, as `"float32"`; "" for anything else.
        shape: Of a tensor.
        value: Of anything else, as JSON; None where JSON cannot hold it.
    """

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    value: str | None = None


@dataclass(frozen=True)
class PlanOptions:
    """The options of a plan, as `attnres_fx.plan` took them.

    Args:
        num_stages: Ranks, P.
        virtual_stages: Stages on each rank, V.
        schedule: Of the pipeline, by PyTorch's name.
        num_microbatches: Of one step.
        align: "require" or "prefer".
        recompute: Whether sublayers keep only their inputs for backward.
        cache: Whether ranks keep the values they have seen.
        memory_limit: Bytes a rank, or None.

    Raises:
        PlanError: An option has the wrong type, or the schedule cannot run these numbers; the error names the option.
    """

    num_stages: int
    virtual_stages: int
    schedule: str
    num_microbatches: int
    align: str
    recompute: bool
    cache: bool
    memory_limit: int | None

    def __post_init__(self) -> None:
        for name in ("num_stages", "virtual_stages", "num_microbatches"):
            object.__setattr__(self, name, checked_index(name, getattr(self, name), least=1))
        schedule = check_schedule(
            self.schedule,
            num_stages=self.num_stages,
            virtual_stages=self.virtual_stages,
            num_microbatches=self.num_microbatches,
        )
        object.__setattr__(self, "schedule", schedule.value)
        checked_choice("align", self.align, ("prefer", "require"))
        for name in ("recompute", "cache"):
            checked_flag(name, getattr(self, name))
        if self.memory_limit is not None:
            object.__setattr__(self, "memory_limit", checked_count("memory_limit", self.memory_limit, least=1))


def options_with_defaults(
    num_stages: int, virtual_stages: int, num_microbatches: int | None, schedule: str | None, **others: Any
) -> PlanOptions:
    """What was asked for, with the default schedule and number of microbatches."""
    num_stages = checked_index("num_stages", num_stages, least=1)
    virtual_stages = checked_index("virtual_stages", virtual_stages, least=1)
    return PlanOptions(
        num_stages=num_stages,
        virtual_stages=virtual_stages,
        schedule=("1F1B" if virtual_stages == 1 else "Interleaved1F1B") if schedule is None else schedule,
        num_microbatches=4 * num_stages if num_microbatches is None else num_microbatches,
        **others,
    )


def input_specs(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[InputSpec, ...]:
    """An example microbatch as data: positional arguments first."""
    specs = []
    for name, value in [*((str(i), a) for i, a in enumerate(args)), *(kwargs or {}).items()]:
        if isinstance(value, torch.Tensor):
            specs.append(InputSpec(name, str(value.dtype).removeprefix("torch."), tuple(map(int, value.shape))))
            continue
        try:
            specs.append(InputSpec(name, value=json.dumps(value)))
        except TypeError:
            specs.append(InputSpec(name))
    return tuple(specs)
