"""Further kinds of calls: every one is captured, and the program used longest ago makes room."""

import copy
import logging

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.conversion import kept_programs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.tables = [torch.full((8,), 1.0 + i) for i in range(5)]

    def forward(self, x, scale=1.0, mask=None):
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        x = x * scale * self.tables[int(scale)]
        return x if mask is None else x * mask


@pytest.mark.slow
def test_any_number_of_kinds_of_calls_is_right_and_the_least_recently_used_goes(monkeypatch, caplog):
    monkeypatch.setattr(kept_programs, "MOST_PROGRAMS", 2)
    model, x = Net().eval(), torch.randn(2, 5, 8)
    converted = ax.convert(model, (x,), check=False)
    calls = [{}, {"scale": 2.0}, {"mask": torch.ones(2, 5, 1)}, {"scale": 2.0}, {"scale": 3.0}, {}]
    for kwargs in calls:
        torch.testing.assert_close(converted(x, **kwargs), model(x, **kwargs))
    kept = converted._attnres_conversion.further["eval"]
    assert [p.signature.constants.get("scale") for p in kept] == [3.0, 2.0]
    assert "MOST_PROGRAMS" in caplog.text
    assert len(list(converted._captured.buffers())) == 3
    torch.testing.assert_close(converted(x, scale=4.0), model(x, scale=4.0))
    assert len(list(converted._captured.buffers())) == 3
    copied = copy.deepcopy(converted)
    torch.testing.assert_close(copied(x, scale=4.0), model(x, scale=4.0))


@pytest.mark.slow
def test_a_float_that_changes_from_call_to_call_is_warned_of_once_and_may_be_a_tensor(caplog):
    class Scaled(Net):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    model, x = Scaled().eval(), torch.randn(2, 5, 8)
    converted = ax.convert(model, (x,), check=False)
    with caplog.at_level(logging.WARNING):
        for scale in (0.5, 0.25, 0.125, 0.75):
            torch.testing.assert_close(converted(x, scale=scale), model(x, scale=scale))
    assert [r.getMessage() for r in caplog.records if "float" in r.getMessage()] != []
    assert caplog.text.count("torch.tensor(") == 1
    count = len(converted._attnres_conversion.further["eval"])
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(converted(x, scale=torch.tensor(scale)), model(x, scale=torch.tensor(scale)))
    assert len(converted._attnres_conversion.further["eval"]) == count + 1
