"""One process of a pipeline: runs the cases of a suite in order and writes what it found, a JSON line a case.

python -m tests.support.pipeline_workers SUITE RANK WORLD FOLDER
"""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attnres_fx import AttnResError
from attnres_fx.partition.checkpoint import load_checkpoint, save_checkpoint
from attnres_fx.partition.runtime import build_pipeline
from tests.support.pipeline_model import HandPlan, HandStages, Layer, batch, loss_fn, whole

CASES = {"two": {}, "four": {}}
EVERY = [(s, 1) for s in ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble")]
EVERY += [(s, 2) for s in ("Interleaved1F1B", "InterleavedZeroBubble")]


def case(*suites, **options):
    def add(function):
        for suite in suites:
            CASES[suite][function.__name__ + "".join(f" {v}" for v in options.values())] = (function, options)
        return function

    return add


def every(*suites, choices):
    def add(function):
        for options in choices:
            case(*suites, **options)(function)
        return function

    return add


# Tools


def build(
    model, schedule="Interleaved1F1B", virtual=2, *, ranks=None, microbatches=4, cache=True, compile=False, **options
):
    ranks = ranks or dist.get_world_size()
    stages = HandStages(model, ranks, virtual, cache=cache)
    plan = HandPlan(ranks, virtual, schedule, microbatches)
    return build_pipeline(stages, plan, loss_fn=loss_fn, compile=compile, **options)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(found, wanted):
    """Largest difference, relative to the largest number wanted."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


def gradient_error(pipeline, reference):
    """Worst relative error over all gradients of this rank; a gradient missing on one side counts as zeros."""
    wanted = dict(reference.named_parameters(remove_duplicate=False))
    worst = 0.0
    for name, parameter in pipeline.named_parameters():
        zeros = torch.zeros_like(wanted[name])
        found = zeros if parameter.grad is None else full(parameter.grad)
        expected = zeros if wanted[name].grad is None else wanted[name].grad
        assert name == "layers.0.query" or "layers.0.key" in name or expected.abs().max() > 0, name
        worst = max(worst, difference(found, expected))
    return worst


def reference_step(reference, *batches):
    loss = loss_fn(torch.cat([reference(ids) for ids, _ in batches]), torch.cat([target for _, target in batches]))
    loss.backward()
    return loss.detach()


def compared(pipeline, reference, ids, target):
    wanted = reference_step(reference, (ids, target))
    found = pipeline.step(ids, target=target)
    return {
        "loss": difference(found, wanted),
        "gradients": gradient_error(pipeline, reference),
        "held": pipeline.num_retained,
    }


def refusal(call):
    try:
        call()
    except AttnResError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


# Against one process


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
    model = whole()
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


# Several steps


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


# Data parallelism


@every("four", choices=[{"schedule": s, "virtual": v} for s, v in EVERY])
def sharded_data_parallel(schedule, virtual):
    return data_parallel("fsdp2", schedule, virtual)


@every("four", choices=[{"schedule": s, "virtual": v} for s, v in EVERY if s != "InterleavedZeroBubble"])
def replicated_data_parallel(schedule, virtual):
    return data_parallel("ddp", schedule, virtual)


def data_parallel(kind, schedule, virtual, *, ranks=2, steps=3, **options):
    replicas = dist.get_world_size() // ranks
    mesh = init_device_mesh("cpu", (replicas, ranks), mesh_dim_names=("dp", "pp"))
    model = whole(tied=True)
    pipeline = build(model, schedule, virtual, ranks=ranks, mesh=mesh, data_parallel=kind, **options)
    theirs = torch.optim.SGD(model.parameters(), lr=0.1)
    ours = torch.optim.SGD(list(pipeline.parameters()), lr=0.1)
    found = {"loss": 0.0, "gradients": 0.0, "norm": 0.0, "evaluated": 0.0}
    for step in range(steps):
        batches = [batch(8, seed=10 * step + i, ignored=0.3 + 0.2 * i) for i in range(replicas)]
        wanted = reference_step(model, *batches)
        ids, target = batches[mesh["dp"].get_local_rank()]
        found["loss"] = max(found["loss"], difference(pipeline.step(ids, target=target), wanted))
        found["gradients"] = max(found["gradients"], gradient_error(pipeline, model))
        if step == 1:  # gradients of two steps
            before = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            found["norm"] = difference(pipeline.clip_grad_norm_(0.5), before)
            everything = loss_fn(torch.cat([model(i) for i, _ in batches]), torch.cat([t for _, t in batches]))
            found["evaluated"] = difference(pipeline.evaluate(ids, target=target).loss, everything.detach())
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
    found["held"] = pipeline.num_retained
    found["sharded"] = all(hasattr(p, "full_tensor") for p in pipeline.parameters()) == (kind == "fsdp2")
    return found


@every("four", choices=[{"kind": "fsdp2"}, {"kind": "ddp"}])
def data_parallel_around_one_rank(kind):
    """Tied parameters of one rank, which data parallelism wraps one by one."""
    return data_parallel(kind, "Interleaved1F1B", 2, ranks=1)


@every("four", choices=[{"schedule": "GPipe", "virtual": 1}, {"schedule": "InterleavedZeroBubble", "virtual": 2}])
def failure_of_one_replica(schedule, virtual):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    pipeline = build(whole(), schedule, virtual, ranks=2, mesh=mesh, data_parallel="fsdp2")
    if dist.get_rank() == 1:
        pipeline.modules[1].fail_at = lambda: True
    return lost(pipeline)


@case("four")
def compiled_and_sharded():
    torch._dynamo.reset()
    return data_parallel("fsdp2", "1F1B", 1, steps=1, compile="aot_eager")


# Checkpoints: written by four stages, read by two, and by none; and the other way


def trained(model, optimizer, steps, run):
    losses = []
    for step in steps:
        losses.append(run(*batch(8, seed=step)).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def pipeline_run(pipeline):
    return lambda ids, target: pipeline.step(ids, target=target)


def unsplit_losses(steps):
    model = whole(tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return trained(model, optimizer, steps, lambda *b: reference_step(model, b))


@case("four")
def checkpoint_of_four_stages():
    pipeline = build(whole(tied=True), virtual=1, schedule="1F1B")
    optimizer = torch.optim.AdamW(list(pipeline.parameters()), lr=1e-2)
    trained(pipeline, optimizer, range(3), pipeline_run(pipeline))
    pipeline.save(FOLDER / "four", optimizer)
    losses, path = [], "four"
    for ranks in (2, 1):  # on to 2 x 2 ranks, and from there to 4 x 1
        mesh = init_device_mesh("cpu", (4 // ranks, ranks), mesh_dim_names=("dp", "pp"))
        sharded = build(whole(tied=True), ranks=ranks, mesh=mesh, data_parallel="fsdp2")
        for parameter in sharded.parameters():
            torch.nn.init.zeros_(parameter)
        optimizer = torch.optim.AdamW(list(sharded.parameters()), lr=5.0)
        sharded.load(FOLDER / path, optimizer)
        path = f"sharded {ranks}"
        losses += trained(sharded, optimizer, [3 + len(losses)], pipeline_run(sharded))
        sharded.save(FOLDER / path, optimizer)
    return {"losses": losses, "wanted": unsplit_losses(range(5))[3:]}


@case("two")
def checkpoint_into_two_stages():
    found = {"wanted": unsplit_losses(range(7))}
    pipeline = build(whole(tied=True), schedule="InterleavedZeroBubble")
    for parameter in pipeline.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(list(pipeline.parameters()), lr=5.0)
    pipeline.load(FOLDER / "sharded 1", optimizer)
    found["two"] = trained(pipeline, optimizer, [5], pipeline_run(pipeline))
    pipeline.save(FOLDER / "two", optimizer)
    one = whole(tied=True)
    for parameter in one.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(one.parameters(), lr=5.0)
    load_checkpoint(FOLDER / "two", one, optimizer)
    assert one.head.weight is one.embed.weight
    found["one"] = trained(one, optimizer, [6], lambda *b: reference_step(one, b))
    one = whole(tied=True)
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
    trained(one, optimizer, range(5), lambda *b: reference_step(one, b))
    save_checkpoint(FOLDER / "one", one, optimizer)
    back = build(whole(tied=True))
    optimizer = torch.optim.AdamW(list(back.parameters()), lr=5.0)
    back.load(FOLDER / "one", optimizer)
    found["back"] = trained(back, optimizer, [5], pipeline_run(back))
    found["missing"] = refusal(lambda: back.load(FOLDER / "nowhere"))
    model = whole()
    model.layers.append(Layer())
    save_checkpoint(FOLDER / "embed", torch.nn.ModuleDict({"embed": model.embed}))
    found["other"] = refusal(lambda: back.load(FOLDER / "embed"))
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    found["stranger"] = refusal(lambda: back.load(FOLDER / "one", stranger))
    return found


# A process that is stuck, and one that dies: last, since nothing can follow


def dies_at_its_third_call(how):
    calls = iter(range(100))
    return lambda: how() if next(calls) == 2 else None


def lost(pipeline):
    ids, target = batch(8)
    start = time.time()
    error = refusal(lambda: pipeline.step(ids, target=target))
    seconds = time.time() - start
    again = refusal(lambda: pipeline.step(ids, target=target))
    return {"error": error, "again": again, "seconds": seconds, "held": pipeline.num_retained}


@case("four")
def stuck_worker():
    group = dist.new_group(timeout=timedelta(seconds=2))
    pipeline = build(whole(), "1F1B", 1, group=group)
    pipeline.step(batch(8)[0], target=batch(8)[1])
    if dist.get_rank() == 1:
        pipeline.modules[1].fail_at = dies_at_its_third_call(lambda: time.sleep(5))
    return lost(pipeline)


@case("four")
def killed_worker():
    pipeline = build(whole(), "Interleaved1F1B", 2)
    pipeline.step(batch(8)[0], target=batch(8)[1])
    if dist.get_rank() == 1:
        pipeline.modules[5].fail_at = dies_at_its_third_call(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return lost(pipeline)


def main(suite, rank, world, folder):
    torch.set_num_threads(1)
    file = f"file://{folder / suite}.group"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    with (folder / f"{suite}.{rank}.jsonl").open("w") as out:
        for name, (function, options) in CASES[suite].items():
            start = time.time()
            try:
                found = function(**options)
            except Exception:
                found = {"exception": traceback.format_exc()}
            out.write(json.dumps([name, found, time.time() - start]) + "\n")
            out.flush()
    if suite != "four":  # where one has died
        dist.barrier()
    os._exit(0)  # what compiled hooks and a dead neighbour leave behind keeps the groups from going down in order


if __name__ == "__main__":
    FOLDER = Path(sys.argv[4])
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), FOLDER)
