"""Random models and requests for plans of them, small enough that all plans can be tried."""

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from attnres_fx.partition import CarriedValue, DeviceSpeed, ModelCosts, StreamCost, SublayerCost
from attnres_fx.partition.planner.request import PlanRequest
from attnres_fx.passes.schedule import DepthSchedule
from tests.support.schedules import SINGLE

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
#: Whole picoseconds for whole operations and bytes, so that nothing is rounded.
WHOLE = [1e12, 5e11, 2.5e11, 1e11]


def sublayers(draw, name, most=30):
    sizes = st.integers(0, most)
    return SublayerCost(name, draw(sizes), draw(sizes), draw(sizes), draw(sizes))


@st.composite
def model_costs(draw, counts, values=12):
    """Streams of these lengths, some with values carried besides and tied parameters."""
    streams, at = [], 0
    for name, count in zip(("encoder", "decoder"), counts, strict=False):
        streams.append(StreamCost(name, at, count, draw(st.integers(0, values))))
        at += count
    chain = [sublayers(draw, str(i)) for i in range(at)]
    if draw(st.booleans()):  # of one size, in streams of nothing: plans equal in seconds and bytes
        chain = [replace(chain[0], name=s.name) for s in chain]
        streams = [replace(s, value_bytes=0) for s in streams]
    carried = []
    for i in range(draw(st.integers(0, 2))):
        made = draw(st.integers(-1, at - 1))
        used = draw(st.sets(st.integers(made + 1, at), min_size=1, max_size=3))
        carried.append(CarriedValue(f"x{i}", draw(st.integers(1, 40)), made, tuple(sorted(used)), draw(st.booleans())))
    places = st.lists(st.sampled_from(["before", "after", *map(str, range(at))]), min_size=2, max_size=3, unique=True)
    tied = [(draw(st.integers(1, 30)), tuple(draw(places))) for _ in range(draw(st.integers(0, 2)))]
    ends = [sublayers(draw, "before"), sublayers(draw, "after")]
    return ModelCosts(tuple(chain), *ends, tuple(streams), tuple(carried), tuple(tied))


def pinned(draw, costs, variant):
    found = {}
    for s in costs.streams:
        cuts = draw(st.sets(st.integers(1, s.count - 1), max_size=4)) if s.count > 1 else set()
        starts = range(s.count) if variant == "full" else (0, *sorted(cuts))
        found[s.name] = DepthSchedule(variant, tuple(starts), s.count)
    return found


@st.composite
def requests(draw, most_sublayers=12, most_stages=4, rounds=(1,)):
    """Everything that can be asked for, small enough for the brute force."""
    virtual = draw(st.sampled_from(rounds))
    ranks = draw(st.integers(1, most_stages))
    count = draw(st.integers(ranks * virtual, max(most_sublayers, ranks * virtual)))
    counts = [count]
    if count > 1 and draw(st.booleans()):
        counts = [split := draw(st.integers(1, count - 1)), count - split]
    costs = draw(model_costs(counts))
    variant = draw(st.sampled_from(["block", "block", "local", "local", "full"]))
    free = len(counts) == 1 and draw(st.booleans())
    blocks = None
    if free and variant != "full" and draw(st.booleans()):
        blocks = draw(st.integers(1, count))
        if draw(st.booleans()):
            blocks = (blocks, min(count, blocks + draw(st.integers(0, 2))))
    schedule = draw(st.sampled_from(["Interleaved1F1B", "InterleavedZeroBubble", *(SINGLE if virtual == 1 else ())]))
    starts = None
    if draw(st.integers(0, 5)) == 0:
        cuts = st.sets(st.integers(1, count - 1), min_size=ranks * virtual - 1, max_size=ranks * virtual - 1)
        starts = (0, *sorted(draw(cuts) if ranks * virtual > 1 else ()))
    device = DeviceSpeed(
        flops=draw(st.sampled_from(WHOLE)),
        memory_bandwidth=draw(st.sampled_from(WHOLE)),
        link_bandwidth=draw(st.sampled_from(WHOLE)),
        link_latency=draw(st.sampled_from([0.0, 2.0**-30, 5e-12])),
    )
    return PlanRequest(
        costs=costs,
        num_stages=ranks,
        virtual_stages=virtual,
        num_microbatches=ranks * draw(st.integers(1, 3)),
        pipeline_schedule=schedule,
        device=device,
        variant=variant,
        block_layouts=None if free else pinned(draw, costs, variant),
        num_blocks=blocks,
        starts=starts,
        align=draw(st.sampled_from(["prefer", "prefer", "require"])),
        optimizer_factor=draw(st.sampled_from([0.0, 3.0, 1.5])),
        recompute=draw(st.booleans()),
        cache=draw(st.booleans()),
    )
