"""Checkpoints written by four stages, read by two, and by none; and the other way."""

from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from attnres_fx.partition.checkpoint import load_checkpoint, save_checkpoint
from tests.support.pipeline_cases.tools import build, case, reference_step, refusal
from tests.support.pipeline_model import Layer, batch, whole

#: Of this run's files, set by the process.
FOLDER = Path()


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


def scheduled(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12)


def scheduled_losses(model, optimizer, scheduler, steps, run):
    losses = []
    for step in steps:
        losses += trained(model, optimizer, [step], run)
        scheduler.step()
    return losses


@case("four")
def run_state_of_four_stages():
    pipeline = build(whole(), virtual=1, schedule="1F1B")
    optimizer = torch.optim.AdamW(list(pipeline.parameters()), lr=1e-2)
    scheduler = scheduled(optimizer)
    scheduled_losses(pipeline, optimizer, scheduler, range(3), pipeline_run(pipeline))
    torch.manual_seed(7 + torch.distributed.get_rank())
    saved = pipeline.async_save(FOLDER / "run", optimizer, step=3, others={"scheduler": scheduler})
    drawn = torch.rand(3)
    for parameter in pipeline.parameters():  # what is written was copied before
        torch.nn.init.zeros_(parameter)
    saved.wait()
    assert saved.done()
    again = scheduled(optimizer)
    loaded = pipeline.load(FOLDER / "run", optimizer, others={"scheduler": again}, random=True)
    same = bool((torch.rand(3) == drawn).all()) and again.state_dict() == scheduler.state_dict()
    found = scheduled_losses(pipeline, optimizer, again, range(3, 5), pipeline_run(pipeline))
    return {"losses": found, "step": loaded.step, "random": loaded.random, "same": same}


@case("two")
def run_state_into_two_stages():
    pipeline = build(whole())
    for parameter in pipeline.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(list(pipeline.parameters()), lr=1e-2)
    scheduler = scheduled(optimizer)
    loaded = pipeline.load(FOLDER / "run", optimizer, others={"scheduler": scheduler}, random=True)
    found = scheduled_losses(pipeline, optimizer, scheduler, range(3, 5), pipeline_run(pipeline))
    one = whole()
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
    wanted = scheduled_losses(one, optimizer, scheduled(optimizer), range(5), lambda *b: reference_step(one, b))[3:]
    refused = refusal(lambda: pipeline.load(FOLDER / "run", others={"scaler": scheduler}))
    return {"losses": found, "wanted": wanted, "step": loaded.step, "random": loaded.random, "refused": refused}
