"""Whether the parts of a plan fit each other: a checksum says that a file is whole, not that it makes sense.

What was asked for is checked as `attnres_fx.plan` checks it, where the dataclasses are made. Here the stages and blocks
must be possible ones, and what the plan says they cost must be what its costs give.
"""

import dataclasses
import json

import torch

from attnres_fx.errors import PlanError, ScheduleError
from attnres_fx.partition.checked_values import checked_amount, checked_count
from attnres_fx.partition.plan.plan import Plan
from attnres_fx.partition.planner.objective import Partition, evaluate
from attnres_fx.partition.planner.request import PlanRequest, check_request
from attnres_fx.passes.schedule import plan_schedule, window_of

_HINT = "plan again instead of editing the file."
#: Of a partition, what the costs and options alone do not give.
_NOT_DERIVED = ("memory_bytes", "gap")


def check_consistency(plan: Plan) -> None:
    """Raises PlanError that names the first part of a plan that does not fit the others."""
    _check_sizes(plan)
    _check_partition(plan)
    _check_values(plan)
    _check_inputs(plan)


def _check_sizes(plan: Plan) -> None:
    count = len(plan.costs.sublayers)
    if len(plan.model.sublayers) != count:
        raise PlanError(f"plan.model.sublayers has {len(plan.model.sublayers)} entries and plan.costs {count}: {_HINT}")
    for place, part in plan.model.parts:
        checked_count(f"plan.model, {place}: parameters", part.parameters)
        checked_count(f"plan.model, {place}: bytes", part.bytes)
    names = [name for name, _ in plan.partition.block_layouts]
    if names != [s.name for s in plan.costs.streams]:
        raise PlanError(f"plan.partition.block_layouts names {names!r:.80}, other streams than plan.costs: {_HINT}")
    for stream in plan.costs.streams:
        layout = plan.block_layouts[stream.name]
        try:
            expected = plan_schedule(stream.count, plan.config)
        except ScheduleError as error:
            raise PlanError(f"plan.config does not fit the stream {stream.name!r}: {error}") from error
        if layout != expected:
            raise PlanError(
                f"plan.partition.block_layouts of {stream.name!r} is {layout!r:.80}, and plan.config gives "
                f"{expected!r:.80}: {_HINT}"
            )


def _check_partition(plan: Plan) -> None:
    options, partition = plan.options, plan.partition
    request = PlanRequest(
        costs=plan.costs,
        num_stages=options.num_stages,
        virtual_stages=options.virtual_stages,
        num_microbatches=options.num_microbatches,
        pipeline_schedule=options.schedule,
        device=plan.device,
        variant=plan.config.variant,
        window=window_of(plan.config),
        block_layouts=plan.block_layouts,
        starts=partition.starts,
        align=options.align,
        optimizer_factor=0.0,
        recompute=options.recompute,
        cache=options.cache,
    )
    check_request(request)
    expected = evaluate(request, partition.starts, plan.block_layouts)
    for field in dataclasses.fields(Partition):
        given, counted = getattr(partition, field.name), getattr(expected, field.name)
        if field.name not in _NOT_DERIVED and given != counted:
            raise PlanError(
                f"plan.partition.{field.name} is {given!r:.80}; for starts={partition.starts!r:.80} and the plan's "
                f"costs, blocks, options and device it is {counted!r:.80}: {_HINT}"
            )
    if len(partition.memory_bytes) != options.num_stages:
        raise PlanError(
            f"plan.partition.memory_bytes has {len(partition.memory_bytes)} entries for num_stages="
            f"{options.num_stages}: {_HINT}"
        )
    checked_amount("plan.partition.gap", partition.gap)
    for rank, (bytes_, least) in enumerate(zip(partition.memory_bytes, expected.memory_bytes, strict=True)):
        checked_count(f"plan.partition.memory_bytes[{rank}]", bytes_, least=least)
        if options.memory_limit is not None and bytes_ > options.memory_limit:
            raise PlanError(
                f"rank {rank} needs {bytes_} bytes (plan.partition.memory_bytes), more than "
                f"memory_limit={options.memory_limit}: {_HINT}"
            )
    if options.align == "require" and partition.unaligned_cuts:
        raise PlanError(f"stages of starts={partition.starts!r:.80} cut blocks, against align='require': {_HINT}")


def _check_values(plan: Plan) -> None:
    names: set[str] = set()
    for i, value in enumerate(plan.values):
        at = f"plan.values[{i}]"
        checked_count(f"{at}.bytes", value.bytes)
        places = (value.produced, *value.used)
        if places[0] < 0 or places[-1] >= len(plan.starts) or list(places) != sorted(set(places)) or not value.used:
            raise PlanError(
                f"{at} goes from stage {value.produced} (produced) to {value.used} (used): these must ascend and be "
                f"stages of the plan, 0 to {len(plan.starts) - 1}; {_HINT}"
            )
        if value.name in names:
            raise PlanError(f"{at}.name {value.name!r:.80} is there twice: {_HINT}")
        names.add(value.name)


def _check_inputs(plan: Plan) -> None:
    for i, spec in enumerate(plan.inputs):
        at = f"plan.inputs[{i}]"
        if spec.dtype and not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
            raise PlanError(f"{at}.dtype is {spec.dtype!r:.80}, which is no dtype of torch: {_HINT}")
        elements = 1
        for size in spec.shape:
            elements *= checked_count(f"{at}.shape", size)
        checked_count(f"{at}.shape, its number of elements", elements)
        try:
            json.loads(spec.value or "null")
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{at}.value is {spec.value!r:.80}, which is no JSON: {error}") from error
