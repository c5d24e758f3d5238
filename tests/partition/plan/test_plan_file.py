"""Plan files with a right checksum and wrong content: refused by name, or a plan that prints."""

import copy
import hashlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import PlanError
from attnres_fx.partition import CarriedValue, DeviceSpeed, ModelCosts, StreamCost, SublayerCost
from attnres_fx.partition.pipeline_schedule import PipelineSchedule
from attnres_fx.partition.plan.fingerprint import ModelFingerprint, PartFingerprint
from attnres_fx.partition.plan.options import PlanOptions
from attnres_fx.partition.plan.plan import Plan
from attnres_fx.partition.planner.objective import evaluate
from attnres_fx.partition.planner.request import PlanRequest
from attnres_fx.passes.schedule import DepthSchedule

NASTY = [0, -1, 1, 3, 10**12, 10**400, 1.5, -0.5, float("nan"), float("inf"), "", "1F1B", "x", True, None, [], {}, [-1]]


class Net(nn.Module):
    def __init__(self, width=8, layers=4):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.mixes = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=False):
            x = x + mix(norm(x))
        return self.norms[-1](x)


def planned(**options):
    return ax.plan(Net(), (torch.randn(2, 3, 8),), num_stages=2, num_microbatches=4, **options)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    planned(config=ax.AttnResConfig(num_blocks=2), recompute=True).save(path)
    return path, json.loads(path.read_text())


def places(value, path=()):
    """Every place in plain data, from the root."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def load_changed(file, path, value):
    where, content = file
    changed = copy.deepcopy(content)
    target, key = changed, "plan"
    for step in path:
        target, key = target[key], step
    target[key] = value
    text = json.dumps(changed["plan"], sort_keys=True).encode()
    changed["checksum"] = hashlib.sha256(text).hexdigest()[: len(content["checksum"])]
    other = where.with_name("changed.json")
    other.write_text(json.dumps(changed))
    return ax.load_plan(other)


@pytest.mark.slow
def test_a_plan_with_any_value_changed_is_refused_or_still_says_what_it_is(file):
    refused = 0
    for path in places(file[1]["plan"]):
        for value in NASTY:
            try:
                plan = load_changed(file, path, value)
            except PlanError:
                refused += 1
                continue
            assert str(plan), path
            assert plan.timeline.step_seconds > 0
            assert plan.traffic.table()
    assert refused > 1000


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("options", "num_stages"), 0, "num_stages must be a whole number of at least 1; it is 0"),
        (("options", "num_stages"), 9, "num_stages=9|num_microbatches=4 is less than num_stages=9"),
        (("options", "virtual_stages"), -1, "virtual_stages must be"),
        (("options", "virtual_stages"), 2, "virtual_stages=2"),
        (("options", "num_microbatches"), 10**12, "num_microbatches=1000000000000"),
        (("options", "num_microbatches"), 1, "num_microbatches=1"),
        (("options", "schedule"), "none", "schedule='none'"),
        (("options", "align"), "perhaps", "align must be one of"),
        (("options", "memory_limit"), -5, "memory_limit must be"),
        (("options", "memory_limit"), 1, "memory_limit=1"),
        (("partition", "starts"), [0], "1 stage starts"),
        (("partition", "starts"), [0, 9], "stage 1 would be empty"),
        (("partition", "starts"), [0, 3], "starts=\\(0, 3\\)"),
        (("partition", "forward_seconds"), [1.0], "partition.forward_seconds"),
        (("partition", "memory_bytes"), [1], "partition.memory_bytes"),
        (("partition", "block_layouts", 0, 1, "starts"), [0, 1], "block_layouts of"),
        (("config", "boundaries"), [1], "plan.config"),
        (("costs", "sublayers", 0, "forward_flops"), -1.0, "forward_flops"),
        (("device", "link_bandwidth"), 0.0, "link_bandwidth"),
        (("inputs", 0, "dtype"), "float", None),
        (("inputs", 0, "dtype"), "load", "dtype"),
        (("values", 0, "produced"), 7, "produced"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(file, path, value, said):
    if said is None:
        assert load_changed(file, path, value).starts == (0, 2)
        return
    with pytest.raises(PlanError, match=said):
        load_changed(file, path, value)


SIZES = st.integers(0, 10**9)
PART = PartFingerprint("part", 0, 0, "")


@st.composite
def split_models(draw):
    """Costs of any kind, with cuts, blocks, a schedule and whether sublayers are run again."""
    ranks, virtual = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    count = draw(st.integers(ranks * virtual, ranks * virtual + 6))
    parts = [SublayerCost(str(i), *(draw(SIZES) for _ in range(4))) for i in range(count + 2)]
    carried = []
    if draw(st.booleans()):
        made = draw(st.integers(-1, count - 1))
        carried.append(CarriedValue("keys", draw(SIZES), made, (draw(st.integers(made + 1, count)),)))
    costs = ModelCosts(
        tuple(parts[:-2]), parts[-2], parts[-1], (StreamCost("main", 0, count, draw(SIZES)),), tuple(carried)
    )
    variant = draw(st.sampled_from(["block", "local", "full"]))
    begins = draw(st.sets(st.integers(1, count - 1))) if count > 1 else set()
    layout = DepthSchedule(variant, tuple(range(count)) if variant == "full" else (0, *sorted(begins)), count)
    cuts = st.sets(st.integers(1, count - 1), min_size=ranks * virtual - 1, max_size=ranks * virtual - 1)
    starts = (0, *sorted(draw(cuts))) if ranks * virtual > 1 else (0,)
    schedule = draw(st.sampled_from([s for s in PipelineSchedule if virtual == 1 or not s.single_stage]))
    return PlanRequest(
        costs=costs,
        num_stages=ranks,
        virtual_stages=virtual,
        num_microbatches=ranks * draw(st.integers(1, 2)),
        pipeline_schedule=schedule,
        device=DeviceSpeed(
            flops=1e9, memory_bandwidth=1e9, link_bandwidth=1e9, link_latency=draw(st.sampled_from([0, 1e-3]))
        ),
        variant=variant,
        block_layouts={"main": layout},
        starts=starts,
        recompute=draw(st.booleans()),
        cache=draw(st.booleans()),
    )


def as_plan(request):
    """The plan of a request whose stages and blocks are given, of a model of which nothing else is known."""
    return Plan(
        model=ModelFingerprint("Model", PART, (PART,) * request.num_sublayers, PART),
        config=ax.AttnResConfig(variant=request.variant),
        options=PlanOptions(
            num_stages=request.num_stages,
            virtual_stages=request.virtual_stages,
            schedule=request.pipeline_schedule,
            num_microbatches=request.num_microbatches,
            align=request.align,
            recompute=request.recompute,
            cache=request.cache,
            memory_limit=request.memory_limit,
        ),
        device=request.device,
        costs=request.costs,
        partition=evaluate(request, request.starts, request.block_layouts),
        values=(),
    )


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(split_models())
def test_the_busy_seconds_of_the_timeline_are_those_of_the_partition(request):
    plan = as_plan(request)
    partition, timeline = plan.partition, plan.timeline
    for rank, actions in enumerate(timeline.ranks):
        stages = sum(partition.forward_seconds[c] + partition.backward_seconds[c] for c in plan.stages_of(rank))
        busy = sum(action.end - action.start for action in actions)
        assert busy == pytest.approx(request.num_microbatches * stages, rel=1e-9, abs=1e-12)
    between_ranks = sum(seconds for seconds in partition.hop_seconds if request.num_stages > 1)
    sending = sum(hop.end - hop.start for hop in timeline.hops)
    assert sending == pytest.approx(request.num_microbatches * between_ranks, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("schedule", "virtual"), [("1F1B", 1), ("InterleavedZeroBubble", 2)])
@pytest.mark.slow
def test_a_plan_that_recomputes_takes_longer_and_keeps_less(schedule, virtual):
    steps = {}
    for recompute in (False, True):
        plan = planned(virtual_stages=virtual, schedule=schedule, recompute=recompute, device=DeviceSpeed(flops=1e6))
        steps[recompute] = plan.timeline.step_seconds, max(plan.timeline.peak_activation_bytes)
        for rank, actions in enumerate(plan.timeline.ranks):
            part, own = plan.partition, plan.stages_of(rank)
            stages = sum(part.forward_seconds[c] + part.backward_seconds[c] for c in own)
            assert sum(a.end - a.start for a in actions) == pytest.approx(4 * stages)
    assert steps[True][0] > steps[False][0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"virtual_stages": torch.ones(2)}, "virtual_stages must be a whole number"),
        ({"num_blocks": (1, 10**30)}, "num_blocks=.* must be a number, or"),
        ({"num_blocks": (3, 1)}, "num_blocks=.* must be a number, or"),
        ({"optimizer_factor": 1e300}, "optimizer_factor in bytes per byte"),
        ({"num_microbatches": 10**6}, "choose num_microbatches of at most 500000"),
        ({"num_microbatches": 10**400}, "num_microbatches must be no more than"),
        ({"link_bandwidth": -1}, "link_bandwidth must be a positive finite number"),
        ({"starts": (0, float("nan"))}, "starts\\[1\\] must be a whole number"),
    ],
)
def test_an_option_that_cannot_be_is_named(options, said):
    with pytest.raises(PlanError, match=said):
        ax.plan(Net(), (torch.randn(2, 3, 8),), **({"num_stages": 2} | options))
