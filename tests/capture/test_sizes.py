"""Which sizes a conversion holds for: anything it was not shown to hold for is refused, never computed wrongly."""

import pytest
import torch
from torch import Tensor, nn

import attnres_fx as ax
from attnres_fx.errors import ArgumentError


class Choosy(nn.Module):
    """Takes another path for odd lengths and for a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2 if x.shape[1] % 2 == 0 else x * 3
        if x.shape[0] == 1:
            h = h + 5
        h = h + self.up(self.norm(h))
        return self.head(h + self.up(self.norm(h)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.up(self.norm(x))
        return self.head(h + self.up(self.norm(h)))


def choosy(how: str) -> tuple[nn.Module, ax.ConvertedModel]:
    model, x = Choosy().eval(), torch.randn(3, 6, 4)
    if how == "module":
        return model, ax.convert(model, (x,))
    free = torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: free, 1: free}})
    return model, ax.convert(program if how == "program" else program.module(), (x,))


def test_a_length_for_which_the_model_takes_another_path_is_captured_when_it_is_called(caplog):
    model, converted = choosy("module")
    with caplog.at_level("INFO"):
        for shape in ((5, 8, 4), (5, 7, 4), (2, 9, 4), (1, 6, 4), (1, 7, 4), (4, 10, 4)):
            x = torch.randn(shape)
            torch.testing.assert_close(converted(x), model(x))
    said = [r.message for r in caplog.records if "a call of another kind is captured" in r.message]
    assert len(said) == 3  # odd lengths; one row of an even length, and of an odd one
    assert "size 1 of 'x' % 2 == 0 does not hold" in said[0]


@pytest.mark.parametrize("how", ["program", "graph module"])
def test_a_length_for_which_the_model_takes_another_path_is_refused(how):
    model, converted = choosy(how)
    x = torch.randn(5, 8, 4)
    torch.testing.assert_close(converted(x), model(x))
    with pytest.raises(ArgumentError, match=r"x\.size\(\)\[1\] % 2 == 0"):
        converted(torch.randn(5, 7, 4))


def test_sizes_of_one_that_were_shown_to_hold_are_taken():
    model = Plain().eval()
    converted = ax.convert(model, (torch.randn(3, 6, 4),))
    for shape in ((1, 6, 4), (3, 1, 4), (1, 1, 4), (2, 9, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(converted(x), model(x))


def test_a_saved_model_refuses_what_it_refused_before(tmp_path):
    _, converted = choosy("module")
    converted.save(tmp_path / "model.pt")
    loaded = ax.load(tmp_path / "model.pt")
    with pytest.raises(ArgumentError, match="size 1 of 'x' % 2 == 0 does not hold"):
        loaded(torch.randn(5, 7, 4))
    with pytest.raises(ArgumentError, match="size 1 in dimension 0"):
        loaded(torch.randn(1, 6, 4))
