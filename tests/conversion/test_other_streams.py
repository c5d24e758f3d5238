"""A call whose residual stream has other reads than the converted one is refused, and not sent where it fails too."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import ArgumentError, BackendError


class Cached(nn.Module):
    """Adds a term to the stream itself, from what it remembers, where there is anything to remember."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.recall = nn.Linear(8, 8)
        self.register_buffer("kept", torch.zeros(4, 16, 8), persistent=False)

    def forward(self, x, start: int):
        rows, length, _ = x.shape
        self.kept[:rows, start : start + length] = x.detach()
        if start:
            x = x + self.recall(x + self.kept[:rows, :start].mean(1, keepdim=True))
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        return x


@pytest.mark.slow
def test_both_ways_in_say_that_one_set_of_reads_cannot_serve_two_streams():
    prompt, token = torch.randn(2, 4, 8), torch.randn(2, 1, 8)
    converted = ax.convert(Cached().eval(), (prompt, 0), check=False)
    with pytest.raises(ArgumentError, match=r"reads norms\.0.*neither convert\(\) nor ax\.compile can serve both"):
        converted(token, 4)
    attached = Cached().eval()
    ax.compile(attached, (prompt, 0), inner="eager")
    with pytest.raises(BackendError, match=r"norms\.0.*not those it serves now"):
        attached(token, 4)
