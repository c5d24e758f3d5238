"""A capture prints nothing of its own: not when it is refused, and not what other threads write."""

import sys
import threading

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.capture.quiet import quiet_tracer
from attnres_fx.errors import CaptureError


class Branching(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.mix, self.norm, self.kind = nn.Linear(8, 8), nn.LayerNorm(8), kind

    def forward(self, x):
        if self.kind == "branch" and x.sum() > 0:
            x = x + 1
        if self.kind == "number" and torch.rand(1).item() < 0.5:
            x = x + 1
        if self.kind == "size":
            x = x[:, : int(x.abs().sum().item())]
        return self.norm(x + self.mix(x))


@pytest.mark.parametrize("kind", ["branch", "number", "size"])
def test_a_refusal_that_depends_on_the_data_prints_nothing(kind, capfd):
    with pytest.raises(CaptureError, match=r"(?i)data.dependent|depends on the data"):
        ax.convert(Branching(kind), (torch.randn(2, 5, 8),))
    assert capfd.readouterr() == ("", "")


def test_what_other_threads_write_meanwhile_is_written(capsys):
    with quiet_tracer():
        print("mine", file=sys.stderr)
        thread = threading.Thread(target=lambda: print("theirs", file=sys.stderr))
        thread.start()
        thread.join()
    print("after", file=sys.stderr)
    assert capsys.readouterr().err == "theirs\nafter\n"
