"""Members of the kinds of design section 4 that no other trap has: each told apart by its rule, not by its name."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from tests.support.stream_text import rows


class DropPath(nn.Module):
    """One drop path that all layers share: in eval mode it is not in the graph."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1) > 0.3).to(x.dtype) / 0.7


class Dropped(nn.Module):
    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.drop = DropPath() if shared else None
        self.eval()

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=False):
            y = mix(norm(x))
            if self.drop is not None:
                y = self.drop(y)
            elif self.training:
                y = y * torch.bernoulli(torch.full((x.shape[0], 1, 1), 0.7)) / 0.7
            x = x + y
        return self.norms[-1](x)


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_done_to_a_branch_in_train_mode_alone_changes_no_name(shared):
    model = Dropped(shared)
    converted = ax.convert(model, (rows(),), config=ax.AttnResConfig(variant="full"), check=False)
    assert [r.name for r in converted.attnres.reads] == ["norms.1", "norms.2"]
    for train in (False, True):
        model.train(train), converted.train(train)
        torch.manual_seed(3)
        expected = model(rows())
        torch.manual_seed(3)
        torch.testing.assert_close(converted(rows()), expected)
