"""Saves in the background: what they write, and who is told when they fail."""

import threading

import pytest
import torch
from torch import nn

from attnres_fx.errors import SaveError
from attnres_fx.partition import pending_save
from attnres_fx.partition.checkpoint import load_checkpoint, whole, write_state
from attnres_fx.partition.runtime.checkpointed import Checkpointed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class OfOneProcess(Checkpointed):
    """A model that saves and loads as a pipeline does."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(3, 3)

    def _checkpoint_parts(self):
        return whole(self.model)


@pytest.fixture
def held_up(monkeypatch):
    """Lets a save write only when the event is set."""
    go_on = threading.Event()

    def late(*args, **options):
        go_on.wait(30)
        write_state(*args, **options)

    monkeypatch.setattr(pending_save, "write_state", late)
    return go_on


def test_what_is_written_is_what_was_there_when_the_save_began(tmp_path, held_up):
    pipeline = OfOneProcess()
    before = pipeline.model.weight.detach().clone()
    saved = pipeline.async_save(tmp_path / "c", step=3)
    assert not saved.done()
    nn.init.zeros_(pipeline.model.weight)
    held_up.set()
    saved.wait()
    model = nn.Linear(3, 3)
    assert load_checkpoint(tmp_path / "c", model).step == 3
    assert torch.equal(model.weight, before)


def test_the_next_save_and_the_next_load_wait(tmp_path, held_up):
    pipeline = OfOneProcess()
    for begun in (pipeline.save, pipeline.async_save, pipeline.load):
        held_up.clear()
        saved = pipeline.async_save(tmp_path / "c")
        threading.Timer(0.2, held_up.set).start()
        begun(tmp_path / "c")
        assert saved.done()


def test_a_save_that_fails_is_told_at_its_wait_and_at_the_next_save_and_leaves_the_next_clean(tmp_path, monkeypatch):
    def full(path, state, *, group=None):
        raise SaveError("the disk is full")

    monkeypatch.setattr(pending_save, "write_state", full)
    pipeline = OfOneProcess()
    with pytest.raises(SaveError, match="the disk is full"):
        pipeline.async_save(tmp_path / "c").wait()
    monkeypatch.undo()
    with pytest.raises(SaveError, match="the disk is full"):
        pipeline.save(tmp_path / "c")
    pipeline.save(tmp_path / "c", step=1)
    assert pipeline.load(tmp_path / "c").step == 1
