"""A small GPT and its input, for stages that are cut by hand."""

import torch

from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT


def gpt(**options):
    torch.manual_seed(0)
    return SmallGPT(GPTConfig(**{"layers": 3, "heads": 2, "width": 16, "context": 16, "vocabulary": 40, **options}))


IDS = {"ids": torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))}
