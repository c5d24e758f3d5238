"""One step of a pipeline against one process."""

import torch
import torch.distributed as dist

from attnres_fx.partition.runtime import build_pipeline
from tests.support.pipeline_cases.tools import EVERY, build, case, compared, difference, every
from tests.support.pipeline_model import HandPlan, HandStages, batch, whole


@every("two", "four", choices=[{"schedule": s, "virtual": v, "cache": c} for s, v in EVERY for c in (True, False)])
def equals_one_process(schedule, virtual, cache):
    model = whole()
    pipeline = build(model, schedule, virtual, cache=cache)
    found = compared(pipeline, model, *batch(8))
    values = {v.name: v for v in pipeline.runner.model_stages.values}
    wanted = {}
    for stage in pipeline.stages:
        forward = sum(values[n].bytes for n in stage.spec.route.sent) * 4
        backward = sum(values[n].bytes for n in stage.spec.route.received if values[n].differentiable) * 4
        wanted.setdefault(stage.stage_index, [0, 0])[0] += forward
        wanted.setdefault(stage.stage_index - 1, [0, 0])[1] += backward
    sent = {hop: [b.forward, b.backward] for hop, b in pipeline.bytes_sent.items()}
    found["bytes"] = sent == {hop: b for hop, b in wanted.items() if any(b)}
    found["total"] = sum(map(sum, sent.values()))
    if virtual == 2:
        order = pipeline.schedule.pipeline_order[dist.get_rank()]
        found["order"] = [str(a) for a in order if a is not None] == list(pipeline.actions)
    found["actions"] = pipeline.actions
    return found


@case("two")
def one_rank_alone():
    worst = {}
    mine = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    for schedule, virtual in [*EVERY, ("Interleaved1F1B", 4), ("InterleavedZeroBubble", 8)]:
        for cache in (True, False):
            if virtual == 1:
                continue
            model = whole(tied=True)
            pipeline = build(model, schedule, virtual, ranks=1, cache=cache, group=mine)
            found = compared(pipeline, model, *batch(8))
            worst = {key: max(worst.get(key, 0), found[key]) for key in found}
            assert not pipeline.bytes_sent
            assert pipeline.modules[0].embed.weight is pipeline.modules[virtual - 1].head.weight
    return worst


@every("two", choices=[{"schedule": s, "virtual": v} for s, v in EVERY if v == 2])
def the_same_to_the_bit(schedule, virtual):
    found = []
    for _ in range(3):
        pipeline = build(whole(), schedule, virtual)
        loss = pipeline.step(batch(8)[0], target=batch(8)[1])
        found.append([loss, *(p.grad for p in pipeline.parameters() if p.grad is not None)])
    return {"equal": all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))}


@every("two", choices=[{"schedule": "1F1B", "virtual": 1}, {"schedule": "Interleaved1F1B", "virtual": 2}])
def compiled_stages(schedule, virtual):
    torch._dynamo.reset()
    model = whole(layers=4)
    pipeline = build(model, schedule, virtual, compile="aot_eager")
    assert all(m._compiled_call_impl is not None for m in pipeline.modules.values())
    return compared(pipeline, model, *batch(8))


@case("two")
def changing_sizes():
    model = whole()
    pipeline = build(model)
    worst = 0.0
    for rows, tokens in ((8, 5), (4, 3), (12, 7), (8, 5)):
        model.zero_grad()
        pipeline.zero_grad()
        found = compared(pipeline, model, *batch(rows, tokens=tokens))
        worst = max(worst, found["loss"], found["gradients"])
    return {"worst": worst, "sizes": len(pipeline.runner.shapes)}


@case("two")
def ignored_tokens():
    """One microbatch with no element that counts, one with a single one."""
    found = {}
    for schedule in ("1F1B", "InterleavedZeroBubble"):
        model = whole()
        ids, target = batch(8)
        target[:2] = -100
        target[2:4] = -100
        target[3, 1] = 7
        found[schedule] = compared(build(model, schedule, 1), model, ids, target)
    nothing = build(whole(), "1F1B", 1)
    found["all ignored"] = nothing.step(ids, target=torch.full_like(target, -100)).item()
    found["zeros"] = all(p.grad is None or not p.grad.any() for p in nothing.parameters())
    other = build_pipeline(
        HandStages(whole(), 2, 1),
        HandPlan(2, 1, "1F1B", 4),
        loss_fn=lambda o, t: torch.nn.functional.cross_entropy(o.flatten(0, 1), t.flatten(), ignore_index=0),
        compile=False,
        ignore_index=0,
    )
    target = target.clamp(min=0)
    wanted = torch.nn.functional.cross_entropy(whole()(ids).flatten(0, 1), target.flatten(), ignore_index=0)
    found["other index"] = difference(other.step(ids, target=target), wanted.detach())
    return found
