"""Small models and their inputs, for stages that are cut by hand and for plans."""

import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.partition import DeviceSpeed


def gpt(**options):
    torch.manual_seed(0)
    return SmallGPT(GPTConfig(**{"layers": 3, "heads": 2, "width": 16, "context": 16, "vocabulary": 40, **options}))


IDS = {"ids": torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))}


class Branches(nn.Module):
    """A linear layer a sublayer, between an embedding and a head: the cheapest model that has them all."""

    def __init__(self, sublayers=8, width=8, vocabulary=10):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(sublayers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def branches(*args, **options):
    torch.manual_seed(0)
    return Branches(*args, **options)


#: Of one microbatch, for plans.
ZEROS = {"ids": torch.zeros(2, 8, dtype=torch.long)}
SLOW = DeviceSpeed(flops=50e9, memory_bandwidth=10e9, link_bandwidth=1e9, link_latency=0.0)


def planned(model=None, **options):
    """A plan of `branches()`, or of the model given, on four stages of two ranks."""
    given = {"num_stages": 2, "virtual_stages": 2, "num_microbatches": 4, "device": SLOW, **options}
    return ax.plan(branches() if model is None else model, kwargs=given.pop("kwargs", ZEROS), **given)


def model_for_the_command():
    """As `attnres-fx plan` takes models: with an example of one microbatch."""
    return branches(), ZEROS
