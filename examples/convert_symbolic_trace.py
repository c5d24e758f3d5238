"""Convert a graph of `torch.fx.symbolic_trace`: `python examples/convert_symbolic_trace.py`."""

import torch
from small_gpt import GPTConfig, SmallGPT

import attnres_fx as ax

model = SmallGPT(GPTConfig(layers=3, width=64)).eval()
ids = torch.randint(0, 256, (2, 32))
graph = torch.fx.symbolic_trace(model)
print(ax.inspect(graph, (ids,)))
converted = ax.convert(graph, (ids,), config=ax.AttnResConfig(variant="full"))
print(f"\n{converted.report}\n\n{ax.verify(model, converted, (ids,))}")
