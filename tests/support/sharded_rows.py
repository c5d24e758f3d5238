"""Run by two workers: every order of a conversion and of what shards a model, against one process.

python -m tests.support.sharded_rows RANK WORLD FILE
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import attnres_fx as ax

CONFIG = ax.AttnResConfig(variant="block", block_size=2)
COMPILED = {"backend": "attnres", "dynamic": False, "options": {"inner": "eager"}}
WITH_AUTOGRAD = {**COMPILED, "options": {"inner": "aot_eager"}}
ROWS_OF_A_RANK, SHAPE = 2, (4, 5, 8)


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width=SHAPE[-1], layers=3):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(Layer(width) for _ in range(layers)), nn.LayerNorm(width)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def net():
    torch.manual_seed(0)
    return Net()


def batch():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def example():
    return (batch()[:ROWS_OF_A_RANK],)


def converted(model):
    return ax.convert(model, example(), config=CONFIG, check=False)


def attached(model):
    ax.attach(model, example(), config=CONFIG)
    return model


def compiled(model, how=COMPILED):
    model.compile(**how)
    return model


def ax_compiled(model):
    ax.compile(model, example(), config=CONFIG, inner="eager", dynamic=False)
    return model


def layers_alone(model):
    for layer in model.layers:
        fully_shard(layer)
    return model


def by_layers(model):
    return fully_shard(layers_alone(model))


def parallel(model):
    style = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {f"layers.*.{name}": how for name, how in style.items()})


def ddp(model):
    return DistributedDataParallel(model)


#: What is done to a model, in this order.
ROWS = {
    "fully_shard, convert": lambda: converted(fully_shard(net())),
    "fully_shard, attach": lambda: attached(fully_shard(net())),
    "convert, fully_shard": lambda: fully_shard(converted(net())),
    "convert, fully_shard by layers": lambda: by_layers(converted(net())),
    "attach, fully_shard, compile": lambda: compiled(fully_shard(attached(net()))),
    "attach, fully_shard by layers, compile": lambda: compiled(by_layers(attached(net())), WITH_AUTOGRAD),
    "ax.compile, fully_shard by layers": lambda: by_layers(ax_compiled(net())),
    "attach, fully_shard of layers alone, compile": lambda: compiled(layers_alone(attached(net()))),
    "convert, DDP": lambda: ddp(converted(net())),
    "attach, DDP, compile": lambda: torch.compile(ddp(attached(net())), **COMPILED),
    "ax.compile, DDP": lambda: ddp(ax_compiled(net())),
    "parallelize_module, convert": lambda: converted(parallel(net())),
    "convert, parallelize_module": lambda: parallel(converted(net())),
    "parallelize_module, attach, compile": lambda: compiled(attached(parallel(net()))),
    "ax.compile, parallelize_module": lambda: parallel(ax_compiled(net())),
    "attach, parallelize_module, compile": lambda: compiled(parallel(attached(net()))),
}


def losses(model, x):
    """Of three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(3):
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


def moved(model):
    """How far the queries went from zero."""
    queries = [p.detach() for n, p in model.named_parameters() if n.endswith(".query")]
    return max((q.full_tensor() if isinstance(q, DTensor) else q).abs().max().item() for q in queries)


def measured(name, wanted):
    """How far a row is from one process; a rank has its rows of the batch, or all where it has a part of weights."""
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        model = ROWS[name]()
        mine = batch() if "parallelize" in name else batch()[ROWS_OF_A_RANK * rank :][:ROWS_OF_A_RANK]
        found = losses(model, mine) / world
        dist.all_reduce(found)
        off = (found - wanted).abs()
        return {"original": off[0].item(), "steps": off.max().item(), "moved": moved(model)}
    except ax.AttnResError as error:
        return {"refused": str(error)}
    finally:
        torch._dynamo.reset()


def main(rank, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch._dynamo.config.optimize_ddp = False
    wanted = losses(converted(net()), batch())
    wanted[0] = losses(net(), batch())[0]  # the original's own
    rows = {name: measured(name, wanted) for name in ROWS}
    if rank == 0:
        print(json.dumps(rows), flush=True)
    dist.barrier()
    os._exit(0)  # DDP's compiled hooks keep the group from going down in order


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
