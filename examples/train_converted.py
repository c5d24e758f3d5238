"""Train a converted model for a few steps: `python examples/train_converted.py`."""

from pathlib import Path

import torch
from small_gpt import GPTConfig, SmallGPT, next_byte_loss

import attnres_fx as ax

torch.manual_seed(0)
text = torch.frombuffer(bytearray(Path(torch.__file__).read_bytes()), dtype=torch.uint8).long()[:65537]
ids, targets = text[:-1].reshape(-1, 8, 64), text[1:].reshape(-1, 8, 64)
converted = ax.convert(SmallGPT(GPTConfig(layers=3, width=64)), (ids[0],))
optimizer = torch.optim.AdamW(ax.parameter_groups(converted), lr=3e-3, weight_decay=0.1)
for step in range(40):
    loss = next_byte_loss(converted(ids[step % len(ids)]), targets[step % len(ids)])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
print(f"\n{ax.depth_weights(converted, (ids[0],))}")
