"""Every plan there is, and what each costs, written from the rules and slowly: what the planner is held to."""

from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise

from attnres_fx.partition.pipeline_schedule import PipelineSchedule
from attnres_fx.partition.planner.objective import evaluate, units_of
from attnres_fx.partition.planner.search import TOLERANCE
from attnres_fx.partition.simulate.action_order import action_orders
from attnres_fx.partition.split.routes import StageValue
from attnres_fx.passes.schedule import DepthSchedule
from tests.support.set_walks import maker_of, needs_of_reads, walk


@dataclass(frozen=True)
class Cost:
    """What `Partition` says of the same: seconds and bytes per virtual stage, memory per rank."""

    forward: list
    backward: list
    hop: list
    hop_forward: list
    hop_backward: list
    memory: list

    @property
    def slowest(self):
        return max(map(sum, zip(self.forward, self.backward, self.hop, strict=True)))


def count_cost(request, starts, schedules):
    """Seconds as fractions, bytes as whole numbers."""
    costs, device, ranks = request.costs, request.device, request.num_stages
    stages = [range(a, b) for a, b in pairwise((*starts, len(costs.sublayers)))]
    at = {i: c for c, stage in enumerate(stages) for i in stage} | {-1: 0, len(costs.sublayers): len(stages) - 1}
    forward, backward, kept, again = ([0] * len(stages) for _ in range(4))
    for i, part in ((-1, costs.before), *enumerate(costs.sublayers), (len(costs.sublayers), costs.after)):
        redone = request.recompute and 0 <= i < len(costs.sublayers)
        forward[at[i]] += Fraction(part.forward_flops) / Fraction(device.flops)
        backward[at[i]] += Fraction(part.backward_flops + redone * part.forward_flops) / Fraction(device.flops)
        if redone:
            kept[at[i]] += next(s.value_bytes for s in costs.streams if s.first <= i < s.first + s.count)
            again[at[i]] = max(again[at[i]], part.activation_bytes)
        else:
            kept[at[i]] += part.activation_bytes
    values = []
    for stream in costs.streams:
        variant, blocks = schedules[stream.name].variant, schedules[stream.name].blocks
        needs = needs_of_reads(variant, blocks)
        for position in range(1, stream.count + 1):
            sources = count_sources(variant, blocks, position)
            closes = variant == "local" and any(b.stop == position for b in blocks)
            reader = at[stream.first + position - (closes or position == stream.count)]
            second = Fraction(stream.value_bytes) / Fraction(device.memory_bandwidth)
            forward[reader] += (sources + 1) * second
            backward[reader] += (3 * sources + 1) * second
            kept[at[stream.first + position - 1]] += stream.value_bytes
        kept[at[stream.first]] += stream.value_bytes  # the root
        for block in blocks[1:] if variant == "local" else ():
            kept[at[stream.first + block.start - 1]] += stream.value_bytes  # the summary
        for thing in set().union(*needs):
            made = at[stream.first + maker_of(thing, blocks)]
            used = {at[stream.first + i] for i, need in enumerate(needs) if thing in need} - {made}
            values.append(StageValue(f"{stream.name} {thing}", made, tuple(sorted(used)), stream.value_bytes))
    for value in costs.carried:
        made = at[value.produced]
        kept[made] += value.bytes
        used = {at[u] for u in value.used} - {made}
        values.append(StageValue(value.name, made, tuple(sorted(used)), value.bytes, value.differentiable))
    hops = [set()] * (len(stages) - 1)
    if ranks > 1:
        hops, _ = walk(values, ranks, request.virtual_stages, seen_at_start=True, forget=not request.cache)
    there = [sum(v.bytes for v in values if v.name in hop) for hop in hops] + [0]
    back = [sum(v.bytes for v in values if v.name in hop and v.differentiable) for hop in hops] + [0]
    latency = 2 * Fraction(device.link_latency) if ranks > 1 else 0
    hop = [latency + Fraction(a + b) / Fraction(device.link_bandwidth) for a, b in zip(there, back, strict=True)]
    hop[-1] = 0
    for c in range(1, len(stages)):
        kept[c] += there[c - 1]
    memory = []
    for rank in range(ranks):
        mine = range(rank, len(stages), ranks)
        parameters = parameters_of_rank(costs, at, ranks, rank)
        full = max(sum(n * kept[c] for c, n in moment.items()) for moment in moments(request, rank))
        state = int(parameters * Fraction(request.optimizer_factor))
        memory.append(parameters + state + max(again[c] for c in mine) + full)
    return Cost(forward, backward, hop, there, back, memory)


def count_sources(variant, blocks, position):
    if variant == "full":
        return 1 + position
    here = next(b for b in blocks if b.start < position <= b.stop)
    if variant == "local":
        return 1 + position - here.start
    return 1 + sum(b.stop <= position for b in blocks) + (position < here.stop)


def parameters_of_rank(costs, at, ranks, rank):
    """Bytes, a tied one once; the costs count it where it is named first."""
    parts = ((-1, costs.before), *enumerate(costs.sublayers), (len(costs.sublayers), costs.after))
    found = sum(part.parameter_bytes for i, part in parts if at[i] % ranks == rank)
    number = {"before": -1, "after": len(costs.sublayers)}
    for size, places in costs.tied:
        here = [at[number.get(p) if p in number else int(p)] % ranks == rank for p in places]
        found += size * (any(here) and not here[0])
    return found


def moments(request, rank):
    """Microbatches in flight per stage after every computation of PyTorch's own order."""
    order = action_orders(
        request.pipeline_schedule,
        num_stages=request.num_stages,
        virtual_stages=request.virtual_stages,
        num_microbatches=request.num_microbatches,
    )[rank]
    frees = "W" if request.pipeline_schedule == PipelineSchedule.ZERO_BUBBLE else "B"
    counts = dict.fromkeys(range(rank, request.num_virtual, request.num_stages), 0)
    found = []
    for action in order:
        counts[action.stage] += (action.kind == "F") - (action.kind in (frees, "B"))
        found.append(dict(counts))
    return found


def allowed_blocks(count, blocks):
    """Starts of blocks within a slack of an even size; the last may be shorter."""
    size, slack = -(-count // blocks), max(1, count // (4 * blocks))
    for starts in combinations(range(count), blocks):
        sizes = [b - a for a, b in pairwise((*starts, count))]
        if starts[0] == 0 and max(sizes) <= size + slack and all(s >= size - slack for s in sizes[:-1]):
            yield starts


def every_schedule(request):
    if request.known_layouts is not None:
        return [request.known_layouts]
    (stream,) = request.costs.streams
    low, high = request.block_counts[0], request.block_counts[-1]
    return [
        {stream.name: DepthSchedule(request.variant, starts, stream.count)}
        for blocks in range(low, high + 1)
        for starts in allowed_blocks(stream.count, blocks)
    ]


def every_plan(request):
    """All that may be, whether it fits the memory or not."""
    for schedules in every_schedule(request):
        units = units_of(request, schedules)
        begins = {s.first + start for s in request.costs.streams for start in schedules[s.name].starts}
        for cuts in combinations(range(1, request.num_sublayers), request.num_virtual - 1):
            starts = (0, *cuts)
            if request.starts in (None, starts) and (request.align == "prefer" or begins.issuperset(starts)):
                yield evaluate(request, starts, schedules, units)


def fits(request, plan):
    return request.memory_limit is None or max(plan.memory_bytes) <= request.memory_limit


def rank_of(plan):
    begins = {
        first + start
        for (_, schedule), first in zip(plan.block_layouts, firsts(plan), strict=True)
        for start in schedule.starts
    }
    aligned = begins <= set(plan.starts) or begins >= set(plan.starts)
    longest = [0]
    for _, schedule in plan.block_layouts:
        sizes = [len(b) for b in schedule.blocks]
        longest.append(max(sizes) - min(sizes) - 1)
    return not aligned, max(longest), plan.objective


def firsts(plan):
    at = 0
    for _, schedule in plan.block_layouts:
        yield at
        at += schedule.num_sublayers


def best_of(plans):
    """The plan the rule chooses; None where there are none."""
    limit = min((p.slowest for p in plans), default=0) * (1 + TOLERANCE)
    return min((p for p in plans if p.slowest <= limit), key=rank_of, default=None)
