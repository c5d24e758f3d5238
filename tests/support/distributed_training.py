"""Run by torchrun-like workers: an attached model under DDP and FSDP2 against one process.

python -m tests.support.distributed_training RANK WORLD FILE
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT, next_byte_loss
from tests.support.attached import with_random_queries
from tests.support.families import widened

CONFIG = ax.AttnResConfig(variant="block", num_blocks=2)
COMPILED = {"backend": "attnres", "dynamic": False, "options": {"inner": "aot_eager"}}


def built():
    torch.manual_seed(0)
    model = widened(SmallGPT(GPTConfig(layers=1, heads=2, width=16, context=16, vocabulary=96, tied=False)))
    ax.attach(model, (torch.zeros(2, 9, dtype=torch.long),), config=CONFIG)
    return with_random_queries(model)


def steps(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for ids in batches:
        loss = next_byte_loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def sharded(batches):
    model = built()
    fully_shard(model)
    model.compile(**COMPILED)
    return steps(model, batches)


def replicated(batches):
    torch._dynamo.config.optimize_ddp = False
    return steps(torch.compile(torch.nn.parallel.DistributedDataParallel(built()), **COMPILED), batches)


def alone(batches):
    model = built()
    model.compile(backend="attnres", fullgraph=True, dynamic=False, options={"inner": "eager"})
    return steps(model, batches)


def main(rank, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.manual_seed(1)
    batch = torch.randint(5, 90, (2 * world, 10))
    batches = [batch.roll(i % 2, 1) for i in range(4)]
    mine = [b[2 * rank : 2 * rank + 2] for b in batches]
    found = {}
    for mode, train in {"fsdp": sharded, "ddp": replicated}.items():
        found[mode] = train(mine) / world
        dist.all_reduce(found[mode])
        torch._dynamo.reset()
    if rank == 0:
        wanted = alone(batches)
        differences = {mode: (losses - wanted).abs().max().item() for mode, losses in found.items()}
        print(json.dumps({**differences, "learned": (wanted[0] - wanted[-1]).item()}), flush=True)
    dist.barrier()
    os._exit(0)  # DDP's compiled hooks keep the group from going down in order


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
