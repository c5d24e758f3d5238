"""`plan`: where to cut a model for a pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal

from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.source_model import Model
from attnres_fx.errors import PlanError
from attnres_fx.partition.checked_values import checked_amount, checked_index, checked_items
from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.measure import measure_costs
from attnres_fx.partition.costs.model_costs import DeviceSpeed, ModelCosts
from attnres_fx.partition.pipeline_schedule import as_pipeline_schedule
from attnres_fx.partition.plan.options import input_specs, options_with_defaults
from attnres_fx.partition.plan.plan import Plan
from attnres_fx.partition.plan.planned_model import (
    OriginalModel,
    carried_values,
    converted_chain,
    fingerprint,
    name_of,
)
from attnres_fx.partition.planner.request import OPTIMIZER_FACTOR, PlanRequest
from attnres_fx.partition.planner.search import find_partition
from attnres_fx.partition.split.chained_model import ChainedGraph
from attnres_fx.partition.split.split_chain import refuse_empty_stages, split_chain
from attnres_fx.passes.schedule import window_of
from attnres_fx.state_config import attention_config, shown_config


def plan(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_stages: int,
    virtual_stages: int = 1,
    num_microbatches: int | None = None,
    schedule: str | None = None,
    config: AttnResConfig | None = None,
    num_blocks: int | tuple[int, int] | None = None,
    starts: Sequence[int] | None = None,
    align: Literal["prefer", "require"] = "prefer",
    memory_limit: int | None = None,
    link_bandwidth: float | None = None,
    device: DeviceSpeed | None = None,
    recompute: bool = False,
    optimizer_factor: float = OPTIMIZER_FACTOR,
    cache: bool = True,
    costs: ModelCosts | None = None,
) -> Plan:
    """Choose where blocks and pipeline stages begin, and say what that costs; changes nothing.

    Source: arXiv 2603.15031, section 4.1.

    Args:
        model: An original (its blocks are chosen) or a converted one (its blocks are kept), with weights or on `meta`.
        args: Example arguments of ONE microbatch.
        kwargs: The same, by keyword.
        num_stages: Ranks P.
        virtual_stages: V, stages on each rank.
        num_microbatches: Of one step; 4 P by default.
        schedule: "GPipe", "1F1B" (default for V = 1), "Interleaved1F1B" (default for V > 1) or "InterleavedZeroBubble".
        config: As for `convert`; without block options in it, blocks are chosen.
        num_blocks: How many blocks, a number or (fewest, most); by default about eight.
        starts: First sublayer of every virtual stage, to choose only the blocks.
        align: "require" cuts at the ends of blocks alone; "prefer" lets a block span stages where that is better.
        memory_limit: The most bytes a rank may need.
        link_bandwidth: Bytes a second, instead of the device's.
        device: Speeds of every rank.
        recompute: Whether sublayers keep only their inputs for backward.
        optimizer_factor: Bytes of gradient and optimizer state per byte of parameter.
        cache: Whether ranks keep the values they have seen.
        costs: The costs to plan with, instead of measured ones.

    Returns:
        The plan: print it, save it, plot it, hand it to `build_stages`.

    Raises:
        PlanError: An option has the wrong type, or nothing fits; the error says what to change.
        AttnResError: Whatever `convert` raises.
    """
    _check_numbers(num_blocks, optimizer_factor)
    pinned_starts = _checked_starts(starts)
    _check_types(config=(config, AttnResConfig), device=(device, DeviceSpeed), costs=(costs, ModelCosts))
    options = options_with_defaults(
        num_stages,
        virtual_stages,
        num_microbatches,
        schedule,
        align=align,
        recompute=recompute,
        cache=cache,
        memory_limit=memory_limit,
    )
    device = _speed(device, link_bandwidth)
    config, given = _config_of(model, config)
    original = None if isinstance(model, ConvertedModel) else OriginalModel(model, args, kwargs, config)
    chained, layouts = original.rewritten() if original else converted_chain(model)
    costs = _costs_of(chained, costs)
    free = original is not None and not given and config.variant != "full" and len(costs.streams) == 1
    if num_blocks is not None and not free:
        raise PlanError(_why_pinned(original is not None, given, config, num_blocks))
    request = PlanRequest(
        costs=costs,
        num_stages=options.num_stages,
        num_microbatches=options.num_microbatches,
        virtual_stages=options.virtual_stages,
        pipeline_schedule=options.schedule,
        device=device,
        variant=config.variant,
        window=window_of(config),
        block_layouts=None if free else {s.name: layouts[s.name] for s in costs.streams},
        num_blocks=_counts(num_blocks, config) if free else None,
        starts=pinned_starts,
        align=options.align,
        memory_limit=options.memory_limit,
        optimizer_factor=float(optimizer_factor),
        recompute=options.recompute,
        cache=options.cache,
    )
    partition = find_partition(request)
    if original is not None and free:
        chosen = dict(partition.block_layouts)
        config = _with_blocks(config, chosen)
        if chosen != layouts:
            chained, _ = original.rewritten(chosen)
    split = split_chain(chained.gm, chained.chain, partition.starts, chained.labels)
    refuse_empty_stages(split)
    return Plan(
        model=fingerprint(name_of(model), chained),
        config=config,
        options=options,
        device=device,
        costs=costs,
        partition=partition,
        values=split.values,
        inputs=input_specs(args, kwargs),
        notes=_notes(options.schedule, costs, original is not None and not given, config),
    )


def _check_numbers(num_blocks: Any, optimizer_factor: Any) -> None:
    """Raises PlanError where one of these options is not the kind of number it must be."""
    checked_amount("optimizer_factor", optimizer_factor)
    pair = isinstance(num_blocks, tuple | list) and len(num_blocks) == 2 and all(map(_is_whole, num_blocks))
    if num_blocks is not None and not pair and not _is_whole(num_blocks):
        raise PlanError(f"num_blocks must be a number or (fewest, most); it is {num_blocks!r:.80}.")


def _checked_starts(starts: Any) -> tuple[int, ...] | None:
    if starts is None:
        return None
    places = checked_items("starts (the first sublayer of every virtual stage)", starts)
    return tuple(checked_index(f"starts[{i}]", place) for i, place in enumerate(places))


def _check_types(**options: tuple[Any, type]) -> None:
    """Raises PlanError for an option that is not of its class, where it is given."""
    for name, (value, kind) in options.items():
        if value is not None and not isinstance(value, kind):
            raise PlanError(f"{name} must be of type {kind.__name__}; it is a {type(value).__name__}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _config_of(model: Model, config: AttnResConfig | None) -> tuple[AttnResConfig, bool]:
    """The conversion to plan for, and whether it says where blocks begin."""
    if isinstance(model, ConvertedModel):
        own = attention_config(model.report.config, "a pipeline plan")
        if config is not None and config != own:
            raise PlanError(
                f"the model was converted with {shown_config(own)}, and config is {shown_config(config)}: leave config "
                f"out, or plan for the original."
            )
        return own, True
    config = config or AttnResConfig()
    return config, config.boundaries is not None or config.block_size is not None


def _speed(device: DeviceSpeed | None, link_bandwidth: float | None) -> DeviceSpeed:
    device = device or DeviceSpeed()
    return device if link_bandwidth is None else replace(device, link_bandwidth=link_bandwidth)


def _costs_of(chained: ChainedGraph, costs: ModelCosts | None) -> ModelCosts:
    """The costs given, where they fit the model, or those measured."""
    if costs is None:
        return measure_costs(chained.gm, chained.chain, carried=carried_values(chained))
    if len(costs.sublayers) != chained.chain.num_sublayers:
        raise PlanError(
            f"costs are given for {len(costs.sublayers)} sublayers and the model has {chained.chain.num_sublayers}: "
            f"give one each, as attnres_fx.inspect lists them."
        )
    return costs


def _with_blocks(config: AttnResConfig, layouts: BlockLayouts) -> AttnResConfig:
    """The config that gives these blocks to a model of one stream."""
    (blocks,) = layouts.values()
    return replace(config, num_blocks=None, block_size=None, boundaries=blocks.starts[1:])


def _why_pinned(original: bool, given: bool, config: AttnResConfig, num_blocks: Any) -> str:
    why = (
        "the model is converted, and keeps its blocks: plan for the original"
        if not original
        else "config gives the blocks already: leave block_size and boundaries out of it"
        if given
        else "variant='full' has none: leave num_blocks out"
        if config.variant == "full"
        else "the model has several streams: give config=AttnResConfig(num_blocks=…), which holds for each"
    )
    return f"num_blocks={num_blocks} cannot be chosen, {why}."


def _counts(num_blocks: int | tuple[int, int] | None, config: AttnResConfig) -> int | tuple[int, int] | None:
    if num_blocks is not None and config.num_blocks is not None:
        raise PlanError(
            f"num_blocks={num_blocks} and config.num_blocks={config.num_blocks} are both given: leave one out."
        )
    if isinstance(num_blocks, tuple | list):
        return int(num_blocks[0]), int(num_blocks[1])
    return config.num_blocks if num_blocks is None else int(num_blocks)


def _notes(schedule: str, costs: ModelCosts, chosen: bool, config: AttnResConfig) -> tuple[str, ...]:
    notes = []
    if as_pipeline_schedule(schedule).splits_backward:
        notes.append("stages run uncompiled: compiled ones have wrong gradients under zero bubble")
    if chosen and len(costs.streams) > 1 and config.variant != "full":
        notes.append("the model has several streams: each has the blocks config gives it, and stages alone are chosen")
    return tuple(notes)
