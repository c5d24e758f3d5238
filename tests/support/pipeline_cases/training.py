"""Several steps: training, accumulation, evaluation, what is kept meanwhile, frozen parameters."""

import torch
import torch.distributed as dist

from attnres_fx.partition.runtime import build_pipeline
from tests.support.pipeline_cases.tools import EVERY, build, case, compared, difference, every, reference_step
from tests.support.pipeline_model import HandPlan, HandStages, batch, loss_fn, whole


@every("two", "four", choices=[{"schedule": s, "virtual": v} for s, v in EVERY if v == 2 or s == "1F1B"])
def five_training_steps(schedule, virtual):
    model = whole(tied=True)
    pipeline = build(model, schedule, virtual)
    ours, theirs = (torch.optim.AdamW(list(m.parameters()), lr=1e-2) for m in (pipeline, model))
    worst, norms = 0.0, 0.0
    for step in range(5):
        wanted = reference_step(model, batch(8, seed=step))
        ids, target = batch(8, seed=step)
        worst = max(worst, difference(pipeline.step(ids, target=target), wanted))
        before = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms = max(norms, difference(pipeline.clip_grad_norm_(0.5), before))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = max(difference(p.detach(), parameters[n].detach()) for n, p in pipeline.named_parameters())
    return {"loss": worst, "norm": norms, "weights": weights, "clipped": before.item() > 0.5}


@every("two", choices=[{"schedule": s, "virtual": v} for s, v in EVERY if v == 2 or s == "1F1B"])
def tied_weights_and_accumulated_steps(schedule, virtual):
    model = whole(tied=True)
    stages = HandStages(model, 2, virtual)
    if dist.get_rank() == 1:  # what differs at the start takes the owner's value
        stages.stages[-1].head.weight = torch.nn.Parameter(torch.zeros_like(model.head.weight))
    plan = HandPlan(2, virtual, schedule, 4)
    pipeline = build_pipeline(stages, plan, loss_fn=loss_fn, compile=False)
    found = [compared(pipeline, model, *batch(8, seed=step)) for step in range(3)]
    evaluated = pipeline.evaluate(batch(8)[0], target=batch(8)[1])
    after = compared(pipeline, model, *batch(8, seed=9))
    infinite = torch.stack([p.grad.abs().max() for p in model.parameters() if p.grad is not None]).max()
    return {
        "worst": max(max(f["loss"], f["gradients"]) for f in (*found, after)),
        "evaluated": difference(evaluated.loss, loss_fn(model(batch(8)[0]), batch(8)[1]).detach()),
        "infinite norm": difference(pipeline.clip_grad_norm_(1e9, float("inf")), infinite),
    }


@every("two", choices=[{"schedule": s, "virtual": v} for s, v in EVERY])
def evaluation_between_steps(schedule, virtual):
    model = whole()
    pipeline = build(model, schedule, virtual)
    ids, target = batch(8)
    plain = pipeline.evaluate(ids, scale=0.5)
    first = compared(pipeline, model, ids, target)
    found = pipeline.evaluate(ids, target=target)
    second = compared(pipeline, model, *batch(4, seed=5))
    outputs = [plain.outputs, found.outputs]
    right = outputs == [None, None]
    if pipeline.stages[-1].is_last:
        right = torch.allclose(outputs[0], model(ids, 0.5)) and torch.allclose(outputs[1], model(ids))
    return {
        "steps": max(first["gradients"], second["gradients"]),
        "loss": difference(found.loss, loss_fn(model(ids), target).detach()),
        "outputs": right and plain.loss is None and not getattr(found.outputs, "requires_grad", False),
        "held": pipeline.num_retained,
        "training": all(m.training for m in pipeline.modules.values()),
    }


@every("two", choices=[{"schedule": "GPipe", "virtual": 1}, {"schedule": "1F1B", "virtual": 1}])
def what_the_cache_holds(schedule, virtual):
    """Bytes of values at the peak, in microbatches' worth."""
    pipeline = build(whole(), schedule, virtual, microbatches=8)
    ids, target = batch(16)
    found = {}
    for what, run in (("step", pipeline.step), ("eval", pipeline.evaluate)):
        pipeline.stages[0].cache.peak_bytes = 0
        run(ids, target=target)
        route = pipeline.stages[0].spec.route
        stages = pipeline.runner.model_stages
        stages.train(what == "step")
        held = sum(v.bytes for v in stages.values if v.name in (*route.received, *route.produced))
        stages.train(True)
        found[what] = pipeline.peak_cache_bytes / held
    return found


@case("two")
def frozen_parameters():
    worst = {}
    for schedule, virtual in EVERY:
        model = whole(tied=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.5" in name or "norm" in name)
        pipeline = build(model, schedule, virtual)
        wanted = reference_step(model, batch(8))
        found = pipeline.step(batch(8)[0], target=batch(8)[1])
        named = dict(model.named_parameters(remove_duplicate=False))
        pairs = [(p.grad, named[n].grad) for n, p in pipeline.named_parameters()]
        assert all((a is None) == (b is None) for a, b in pairs)
        errors = [difference(a, b) for a, b in pairs if b is not None]
        worst[f"{schedule} {virtual}"] = max([difference(found, wanted), *errors])
    return worst
