"""What random programs do to whole states: factors, movements of rows, and merges with earlier states."""

from typing import Any

import torch
from torch import nn

from tests.support.residual_programs import WIDTH


def factor(m: nn.Module, name: str, h: Any) -> Any:
    if name == "half":
        return h / 2
    if name == "quarter on the left":
        return 0.25 * h
    if name == "negative":
        return -h
    if name == "carry":
        return h * m.carry
    if name == "masked_fill":
        return h.masked_fill(m.carry < 0.8, 0.0)
    return h * torch.sigmoid(m.embed.weight.mean())


def move(name: str, h: Any) -> Any:
    return {
        "sequence first": lambda: h.transpose(0, -2),
        "flattened": lambda: h.reshape(-1, WIDTH),
        "all but the first token": lambda: h[1:],
        "roll": lambda: torch.roll(h, 1, -2),
        "flip": lambda: torch.flip(h, (-2,)),
        "permute and back": lambda: h.transpose(0, -2).transpose(-2, 0),
        "cat and split": lambda: torch.cat([h.split((2, WIDTH - 2), -1)[0], h.split((2, WIDTH - 2), -1)[1]], -1),
        "narrow and cat": lambda: torch.cat([h.narrow(0, 0, 1), h[1:]], 0),
        "features in two": lambda: torch.cat([h.chunk(2, -1)[0], h.chunk(2, -1)[1]], dim=-1),
        "unbind and stack": lambda: torch.stack([h.unbind(-1)[i] for i in range(WIDTH)], -1),
        "float64": lambda: h.to(torch.float64),
        "float32 and back": lambda: h.float().double(),
        "roll time": lambda: torch.roll(h, 1, 2),
        "all but the first time": lambda: h[:, :, 1:],
        "cat of times": lambda: torch.cat([h[..., :1], h[..., 1:]], -1),
        "transpose and back": lambda: h.transpose(0, 2).transpose(0, 2),
    }[name]()


def merged(how: str, h: Any, earlier: Any) -> Any:
    return {
        "h + e": lambda: h + earlier,
        "e + h": lambda: earlier + h,
        "halves": lambda: 0.5 * h + 0.5 * earlier,
        "lerp": lambda: torch.lerp(h, earlier, 0.25),
        "difference": lambda: h - 0.5 * earlier,
    }[how]()
