"""Failures in the middle of a step, and what is refused."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attnres_fx.partition.runtime import build_pipeline
from tests.support.pipeline_cases.tools import EVERY, build, case, compared, every, reference_step, refusal
from tests.support.pipeline_model import HandPlan, HandStages, batch, loss_fn, whole


@every("two", choices=[{"schedule": s, "virtual": v} for s, v in EVERY])
def failure_in_the_middle_of_a_step(schedule, virtual):
    model = whole()
    pipeline = build(model, schedule, virtual)
    ids, target = batch(8)
    reference_step(model, (ids, target))
    pipeline.step(ids, target=target)
    found = {"errors": [], "held": 0}
    for rank in range(2):
        if dist.get_rank() == rank:  # the third forward of this rank's last stage
            calls = iter(range(100))
            pipeline.modules[max(pipeline.modules)].fail_at = lambda calls=calls: next(calls) == 2
        found["errors"].append(refusal(lambda: pipeline.step(ids, target=target)))
        found["held"] += pipeline.num_retained
        for module in pipeline.modules.values():
            module.fail_at = None
    original = pipeline.runner.loss.loss_fn
    pipeline.runner.loss.loss_fn = lambda outputs, target: outputs.no_such_thing
    found["errors"].append(refusal(lambda: pipeline.step(ids, target=target)))
    pipeline.runner.loss.loss_fn = original
    if dist.get_rank() == 1:
        handle = pipeline.modules[max(pipeline.modules)].norm.weight.register_hook(lambda g: g.no_such_thing)
    found["errors"].append(refusal(lambda: pipeline.step(ids, target=target)))
    if dist.get_rank() == 1:
        handle.remove()
    model.zero_grad()
    pipeline.zero_grad()
    found["after"] = compared(pipeline, model, ids, target)
    return found


@case("two")
def bad_input():
    ids, target = batch(8)
    plan = HandPlan(2, 1, "1F1B", 4)

    def built(plan=plan, stages=None, **options):
        stages = stages or HandStages(whole(), 2, plan.virtual_stages)
        return build_pipeline(stages, plan, loss_fn=loss_fn, **options)

    pipeline = built(compile=False)
    other = HandStages(whole(), 2, 1)
    other.stages = [s for s in other.stages if s.index != dist.get_rank()]
    empty = HandStages(whole(), 2, 1)
    empty.stages = [s.to("meta") for s in empty.stages]
    compiled = HandStages(whole(), 2, 2)
    for stage in compiled.stages:
        stage.layers["0" if stage.index == 0 else str(stage.mine[0])].compile(backend="eager")
    zero_bubble = HandPlan(2, 2, "InterleavedZeroBubble", 4)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "pp"))
    found = {
        "world": refusal(lambda: built(HandPlan(4, 1, "1F1B", 4))),
        "other plan": refusal(lambda: built(zero_bubble, HandStages(whole(), 2, 1))),
        "virtual": refusal(lambda: built(HandPlan(2, 2, "1F1B", 4))),
        "schedule": refusal(lambda: built(HandPlan(2, 1, "ZBVZeroBubble", 4))),
        "microbatches": refusal(lambda: built(HandPlan(2, 1, "1F1B", 1), compile=False)),
        "rounds": refusal(lambda: built(HandPlan(2, 2, "Interleaved1F1B", 5), compile=False)),
        "ddp": refusal(lambda: built(zero_bubble, mesh=mesh, data_parallel="ddp")),
        "compile": refusal(lambda: built(zero_bubble, compile=True)),
        "backend": refusal(lambda: built(zero_bubble, compile="aot_eager")),
        "compiled": refusal(lambda: built(zero_bubble, compiled)),
        "no mesh": refusal(lambda: built(data_parallel="fsdp2")),
        "mode": refusal(lambda: built(mesh=mesh, data_parallel="zero3")),
        "mesh": refusal(lambda: built(mesh=mesh["dp"])),
        "missing": refusal(lambda: built(stages=other)),
        "meta": refusal(lambda: built(stages=empty)),
        "no backend": refusal(lambda: built(compile="nonsense")),
        "no gradients": refusal(torch.no_grad()(lambda: pipeline.step(ids, target=target))),
        "rows": refusal(lambda: pipeline.step(ids[:6], target=target[:6])),
        "target": refusal(lambda: pipeline.step(ids, target=target[:4])),
    }
    model = whole()
    found["after"] = compared(pipeline, model, ids, target)
    return found


@case("two")
def values_of_another_dtype():
    stages = HandStages(whole(), 2, 1)
    stages.shapes = lambda flat: {n: (s, torch.float32) for n, (s, _) in HandStages.shapes(stages, flat).items()}
    pipeline = build_pipeline(stages, HandPlan(2, 1, "1F1B", 4), loss_fn=loss_fn, compile=False)
    return {"error": refusal(lambda: pipeline.step(batch(8)[0], target=batch(8)[1]))}
