"""Run by torchrun-like workers: an attached model under DDP or FSDP2 against one process.

python -m tests.support.distributed_training MODE RANK WORLD FILE
"""

import os
import sys

import torch
import torch.distributed as dist

import attnres_fx as ax
from tests.support.families import FAMILIES

CONFIG = ax.AttnResConfig(variant="block", num_blocks=2)


def built():
    model, kwargs, _ = FAMILIES["llama"]()
    ax.attach(model, kwargs=kwargs, config=CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_(generator=generator)
    return model


def steps(model, batches, run):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for ids in batches:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(mode, rank, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.manual_seed(1)
    batches = [torch.randint(5, 90, (2 * world, 9)) for _ in range(4)]
    mine = [b[2 * rank : 2 * rank + 2] for b in batches]
    alone = built()
    alone.compile(backend="attnres", fullgraph=True, dynamic=True, options={"inner": "aot_eager"})
    wanted = steps(alone, batches, alone)
    model = built()
    if mode == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        run = torch.compile(wrapped, backend="attnres", options={"inner": "aot_eager"})
        torch._dynamo.config.optimize_ddp = False
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        run = model
        run.compile(backend="attnres", options={"inner": "aot_eager"})
    found = steps(model, mine, run)
    totals = torch.tensor(found)
    dist.all_reduce(totals)
    difference = (totals / world - torch.tensor(wanted)).abs().max().item()
    if rank == 0:
        print(f"losses differ by {difference:.2e}", flush=True)
    dist.barrier()
    os._exit(0)  # DDP's compiled hooks keep the group from going down in order


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
