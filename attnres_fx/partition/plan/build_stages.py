"""`build_stages`: the modules between the cuts of a plan."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnres_fx.conversion.convert import convert
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.source_model import Model
from attnres_fx.errors import ExampleError, PlanError, ScheduleError
from attnres_fx.partition.plan.plan import Plan
from attnres_fx.partition.plan.planned_model import fingerprint, name_of
from attnres_fx.partition.split.chained_model import (
    chains_of,
    stages_of,
)
from attnres_fx.partition.split.stages import Stages
from attnres_fx.passes import Lowering
from attnres_fx.state_config import attention_config


def build_stages(
    model: Model,
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    check: bool = True,
    lowering: Lowering | None = None,
) -> Stages:
    """Cut a model where a plan says: one module per virtual stage, in order.

    Weights are shared with the model, on whatever device they are (`meta` too).

    Args:
        model: What the plan was made for; an original is converted with the plan's config first.
        plan: Where to cut.
        args: Example arguments of one microbatch, for that conversion; by default zeros of the planned shapes.
        kwargs: The same, by keyword.
        check: Whether that conversion checks itself; see `attnres_fx.convert`.
        lowering: Of each stage, as for `attnres_fx.convert`.

    Returns:
        `stages[c]` is a GraphModule that holds its own parameters alone, under the names they have in the model.

    Raises:
        PlanError: The model is not the one that was planned.
        AttnResError: Whatever `attnres_fx.convert` raises.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a Plan; it is a {type(plan).__name__}. Read a file with attnres_fx.load_plan.")
    converted = model if isinstance(model, ConvertedModel) else _convert(model, plan, args, kwargs, check, lowering)
    plan.check_config(attention_config(converted.report.config, "build_stages"))
    chains = chains_of(converted)
    chained = next(iter(chains.values()))
    plan.check_model(fingerprint(name_of(converted), chained))
    blocks = {s.stream.name: s.schedule for s in converted.report.streams}
    for name, planned in plan.block_layouts.items():
        if blocks[name].starts != planned.starts:
            raise PlanError(
                f"the plan's blocks of {name!r} begin at {planned.starts} and the model's at {blocks[name].starts}: "
                f"convert with plan.config, or plan for this model."
            )
    return stages_of(
        converted,
        plan.starts,
        num_stages=plan.num_stages,
        virtual_stages=plan.virtual_stages,
        cache=plan.options.cache,
        lowering=lowering,
        recompute=plan.options.recompute,
        chains=chains,
    )


def _convert(
    model: Model,
    plan: Plan,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    check: bool,
    lowering: Lowering | None,
) -> ConvertedModel:
    if not args and not kwargs:
        args, kwargs = _example(plan, model)
    try:
        return convert(model, args, kwargs, config=plan.config, check=check, lowering=lowering)
    except ScheduleError as error:
        raise PlanError(
            f"the plan was made for another model, of {len(plan.costs.sublayers)} sublayers: {error} Plan again for "
            f"this model."
        ) from error
    except ExampleError as error:
        raise PlanError(
            f"the model does not run on the planned example ({error}) Plan again for this model, or give build_stages "
            f"args and kwargs that it takes."
        ) from error


def _example(plan: Plan, model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Zeros of the planned shapes, on the model's device."""
    tensors = model.parameters() if isinstance(model, nn.Module) else ()
    device = next((p.device for p in tensors), torch.device("cpu"))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for spec in plan.inputs:
        if not spec.dtype and spec.value is None:
            raise PlanError(
                f"argument {spec.name!r} of the planned example cannot be made again from the plan: give build_stages "
                f"args and kwargs."
            )
        value = (
            torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            if spec.dtype
            else json.loads(str(spec.value))
        )
        if spec.name.isdigit():
            args.append(value)
        else:
            kwargs[spec.name] = value
    return tuple(args), kwargs
