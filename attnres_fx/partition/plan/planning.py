"""`plan` and `build_stages`: where to cut a model for a pipeline, and the modules between the cuts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from attnres_fx.capture.programs import Captured, capture
from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.convert import Model, convert, refuse_converted, rewrite_
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.errors import AttnResError, CaptureError, PlanError, ScheduleError
from attnres_fx.partition.checked_values import checked_amount, checked_index, checked_items
from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.measure import measure_costs
from attnres_fx.partition.costs.model_costs import CarriedValue, DeviceSpeed, ModelCosts
from attnres_fx.partition.pipeline_schedule import as_pipeline_schedule
from attnres_fx.partition.plan.fingerprint import ModelFingerprint, fingerprint_part
from attnres_fx.partition.plan.plan import InputSpec, Plan, PlanOptions
from attnres_fx.partition.planner.request import OPTIMIZER_FACTOR, PlanRequest
from attnres_fx.partition.planner.search import find_partition
from attnres_fx.partition.split.chained_model import (
    ChainedGraph,
    chain_graph,
    chains_of,
    name_as_the_model_does,
    stages_of,
)
from attnres_fx.partition.split.stage_graphs import refuse_empty_stages, split_chain
from attnres_fx.partition.split.stages import Stages
from attnres_fx.passes import DepthSchedule, Lowering, analyze_, plan_depth_reads
from attnres_fx.passes.normalize.inline_regions import getattr_path
from attnres_fx.passes.rewrite.parameters import make_parameters
from attnres_fx.passes.streams.selection import select_streams


class _Original:
    """One mode of a model that is not converted yet, rewritten for whatever blocks are asked."""

    def __init__(self, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None, config: AttnResConfig):
        refuse_converted(model)
        self.name = type(model).__name__
        self.config = config
        self.captured = _captured(model, args, kwargs)
        self.pristine = next(iter(self.captured.graphs.values())).gm

    def rewritten(
        self, schedules: Mapping[str, DepthSchedule] | None = None
    ) -> tuple[ChainedGraph, dict[str, DepthSchedule]]:
        """The graph with depth attention for these blocks, by default those of the config, and its schedules."""
        gm = _copied(self.pristine)
        name_as_the_model_does(gm, self.captured.root)
        found = analyze_(gm)
        selected = select_streams(found, self.config, self.name)
        plan = plan_depth_reads(found, selected, self.config, schedules=schedules)
        parameters = make_parameters(gm.graph, self.captured.root, plan, self.config)
        replacements = rewrite_(gm, found, plan, parameters)
        return chain_graph(gm, selected, replacements), {s.stream.name: s.schedule for s in plan.streams}


def _captured(model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Captured:
    """One mode: the train graph where there is one, since that is what a pipeline trains."""
    try:
        return capture(model, args, kwargs, modes=("train",))
    except CaptureError as error:
        try:
            return capture(model, args, kwargs, modes=("eval",))
        except (CaptureError, KeyError):
            raise error from error.__cause__


class _Traced:
    """A symbolic trace: its modules are opened, and its operations known, when it is exported again."""

    def __init__(self, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None, config: AttnResConfig):
        self.model, self.args, self.kwargs, self.config = model, args, kwargs, config

    def rewritten(self, schedules: BlockLayouts | None = None) -> tuple[ChainedGraph, dict[str, DepthSchedule]]:
        config = self.config
        if schedules:
            (blocks,) = schedules.values()
            config = replace(config, num_blocks=None, block_size=None, boundaries=blocks.starts[1:])
        return _converted_chain(convert(self.model, self.args, self.kwargs, config=config, check=False))


def _copied(gm: GraphModule) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return GraphModule(gm, graph)


def carried_values(chained: ChainedGraph) -> tuple[CarriedValue, ...]:
    """What sublayers hand to later ones besides the sources of their streams."""
    count = chained.chain.num_sublayers
    every = split_chain(chained.gm, chained.chain, range(count), chained.labels)
    return tuple(
        CarriedValue(v.name, v.bytes, v.produced, v.used, v.differentiable)
        for v in every.values
        if v.name not in chained.labels
    )


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

    model: an original (its blocks are chosen) or a converted one (its blocks are kept), with weights or on `meta`.
    args, kwargs: example arguments of ONE microbatch. num_stages: ranks P; virtual_stages: V, stages on each of them.
    num_microbatches: a step; 4 P by default. schedule: "GPipe", "1F1B" (default for V = 1), "Interleaved1F1B" (default
    for V > 1) or "InterleavedZeroBubble".
    config: as for `convert`; without block options in it, blocks are chosen: `num_blocks` of them, a number or (fewest,
    most), by default about eight. starts: first sublayer of every virtual stage, to choose only the blocks.
    align: "require" cuts at the ends of blocks alone; "prefer" lets a block span stages where that is better.
    memory_limit: bytes a rank. device: speeds; link_bandwidth: bytes a second, in place of the device's.
    recompute: sublayers keep only their inputs for backward. optimizer_factor: bytes of gradient and optimizer state
    per byte of parameter. cache: whether ranks keep the values they have seen. costs: in place of those measured.

    Raises PlanError where nothing fits, saying what to change, and whatever `convert` raises.
    Source: arXiv 2603.15031, section 4.1.
    """
    _check_given(starts, num_blocks, optimizer_factor)
    for name, value, kind in (
        ("config", config, AttnResConfig),
        ("device", device, DeviceSpeed),
        ("costs", costs, ModelCosts),
    ):
        if value is not None and not isinstance(value, kind):
            raise PlanError(f"{name} must be of type {kind.__name__}; it is a {type(value).__name__}.")
    checked_index("num_stages", num_stages, least=1)
    options = PlanOptions(
        num_stages=num_stages,
        virtual_stages=virtual_stages,
        schedule=("1F1B" if virtual_stages == 1 else "Interleaved1F1B") if schedule is None else schedule,
        num_microbatches=4 * num_stages if num_microbatches is None else num_microbatches,
        align=align,
        recompute=recompute,
        cache=cache,
        memory_limit=memory_limit,
    )
    device = device or DeviceSpeed()
    if link_bandwidth is not None:
        device = replace(device, link_bandwidth=link_bandwidth)
    config, given = _config_of(model, config)
    original = None if isinstance(model, ConvertedModel) else _original(model, args, kwargs, config)
    chained, schedules = original.rewritten() if original else _converted_chain(model)
    if costs is None:
        costs = measure_costs(chained.gm, chained.chain, carried=carried_values(chained))
    elif len(costs.sublayers) != chained.chain.num_sublayers:
        raise PlanError(
            f"costs are given for {len(costs.sublayers)} sublayers and the model has {chained.chain.num_sublayers}: "
            f"give one each, as attnres_fx.inspect lists them."
        )
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
        block_layouts=None if free else {s.name: schedules[s.name] for s in costs.streams},
        num_blocks=_counts(num_blocks, config) if free else None,
        starts=None if starts is None else tuple(map(int, starts)),
        align=options.align,
        memory_limit=options.memory_limit,
        optimizer_factor=float(optimizer_factor),
        recompute=options.recompute,
        cache=options.cache,
    )
    partition = find_partition(request)
    chosen = dict(partition.block_layouts)
    if original is not None and free:
        (blocks,) = chosen.values()
        config = replace(config, num_blocks=None, block_size=None, boundaries=blocks.starts[1:])
        if chosen != schedules:
            chained, _ = original.rewritten(chosen)
    split = split_chain(chained.gm, chained.chain, partition.starts, chained.labels)
    refuse_empty_stages(split)
    return Plan(
        model=fingerprint(_name_of(model), chained),
        config=config,
        options=options,
        device=device,
        costs=costs,
        partition=partition,
        values=split.values,
        inputs=_input_specs(args, kwargs),
        notes=_notes(options.schedule, costs, original is not None and not given, config),
    )


def load_plan(path: str | Path) -> Plan:
    """Read what `Plan.save` wrote. Raises PlanError for a file that is cut short, edited, or of another format."""
    return Plan.load(path)


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

    model: what the plan was made for; an original is converted with the plan's config first, on `args` and `kwargs`, or
    on zeros of the planned shapes. check: of that conversion. lowering: of each stage, as for `convert`.
    Returns Stages: `stages[c]` is a GraphModule that holds its own parameters alone, under the names they have in the
    model, on whatever device they are (`meta` too). Weights are shared with the model.

    Raises PlanError for another model than the planned one, and whatever `convert` raises.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a Plan; it is a {type(plan).__name__}. Read a file with attnres_fx.load_plan.")
    converted = model if isinstance(model, ConvertedModel) else _convert(model, plan, args, kwargs, check, lowering)
    plan.check_config(converted.report.config)
    chains = chains_of(converted)
    chained = next(iter(chains.values()))
    plan.check_model(fingerprint(_name_of(converted), chained))
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
    except AttnResError:
        raise
    except Exception as error:
        raise PlanError(
            f"the model does not run on the planned example ({type(error).__name__}: {error}): plan again for this "
            f"model, or give build_stages args and kwargs that it takes."
        ) from error


def _check_given(starts: Any, num_blocks: Any, optimizer_factor: Any) -> None:
    """Raises PlanError for options of another kind than they must be."""
    checked_amount("optimizer_factor", optimizer_factor)
    pair = isinstance(num_blocks, tuple | list) and len(num_blocks) == 2 and all(map(_is_whole, num_blocks))
    if num_blocks is not None and not pair and not _is_whole(num_blocks):
        raise PlanError(f"num_blocks must be a number or (fewest, most); it is {num_blocks!r:.80}.")
    if starts is not None:
        for i, start in enumerate(checked_items("starts (the first sublayer of every virtual stage)", starts)):
            checked_index(f"starts[{i}]", start)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _config_of(model: Model, config: AttnResConfig | None) -> tuple[AttnResConfig, bool]:
    """The conversion to plan for, and whether it says where blocks begin."""
    if isinstance(model, ConvertedModel):
        own = model.report.config
        if config is not None and config != own:
            raise PlanError(
                f"the model was converted with {own} and config={config}: leave config out, or plan for the original."
            )
        return own, True
    config = config or AttnResConfig()
    return config, config.boundaries is not None or config.block_size is not None


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


def _original(
    model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None, config: AttnResConfig
) -> "_Original | _Traced":
    traced = isinstance(model, GraphModule) and not hasattr(model, "_in_spec")
    return (_Traced if traced else _Original)(model, args, kwargs, config)


def _converted_chain(model: Any) -> tuple[ChainedGraph, dict[str, DepthSchedule]]:
    chains = chains_of(model)
    return chains.get("train") or chains["eval"], {s.stream.name: s.schedule for s in model.report.streams}


def _name_of(model: Any) -> str:
    return model.report.model if isinstance(model, ConvertedModel) else type(model).__name__


def _notes(schedule: str, costs: ModelCosts, chosen: bool, config: AttnResConfig) -> tuple[str, ...]:
    notes = []
    if as_pipeline_schedule(schedule).splits_backward:
        notes.append("stages run uncompiled: compiled ones have wrong gradients under zero bubble")
    if chosen and len(costs.streams) > 1 and config.variant != "full":
        notes.append("the model has several streams: each has the blocks config gives it, and stages alone are chosen")
    return tuple(notes)


def fingerprint(name: str, chained: ChainedGraph) -> ModelFingerprint:
    """Names, shapes and dtypes of what every sublayer holds, without what a conversion adds."""
    chain = chained.chain
    parts = []
    for unit in range(-1, chain.num_sublayers + 1):
        held = {
            str(i.target): getattr_path(chained.gm, str(i.target))
            for n in chain.members(unit)
            for i in n.all_input_nodes
            if i.op == "get_attr" and not str(i.target).startswith("attnres.")
        }
        own = [(n, t) for n, t in held.items() if isinstance(t, nn.Parameter)]
        label = chain.names[unit] if 0 <= unit < chain.num_sublayers else ("before" if unit < 0 else "after")
        parts.append(fingerprint_part(label, own))
    return ModelFingerprint(name, parts[0], tuple(parts[1:-1]), parts[-1])


def _input_specs(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[InputSpec, ...]:
    found = []
    for name, value in [*((str(i), a) for i, a in enumerate(args)), *(kwargs or {}).items()]:
        if isinstance(value, torch.Tensor):
            found.append(InputSpec(name, str(value.dtype).removeprefix("torch."), tuple(map(int, value.shape))))
            continue
        try:
            found.append(InputSpec(name, value=json.dumps(value)))
        except TypeError:
            found.append(InputSpec(name))
    return tuple(found)


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
