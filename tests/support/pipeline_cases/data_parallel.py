"""Pipelines under data parallelism."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.support.pipeline_cases.lost_processes import lost
from tests.support.pipeline_cases.tools import EVERY, build, case, difference, every, gradient_error, reference_step
from tests.support.pipeline_model import batch, loss_fn, whole


@every("four", choices=[{"schedule": s, "virtual": v} for s, v in EVERY])
def sharded_data_parallel(schedule, virtual):
    return data_parallel("fsdp2", schedule, virtual)


@every("four", choices=[{"schedule": s, "virtual": v} for s, v in EVERY if s != "InterleavedZeroBubble"])
def replicated_data_parallel(schedule, virtual):
    return data_parallel("ddp", schedule, virtual)


def data_parallel(kind, schedule, virtual, *, ranks=2, steps=3, layers=8, **options):
    replicas = dist.get_world_size() // ranks
    mesh = init_device_mesh("cpu", (replicas, ranks), mesh_dim_names=("dp", "pp"))
    model = whole(tied=True, layers=layers)
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
    return data_parallel("fsdp2", "1F1B", 1, steps=1, layers=4, compile="aot_eager")
