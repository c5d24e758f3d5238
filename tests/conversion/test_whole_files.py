"""Files are written as a whole or not at all, and say what they are."""

import json
import os
import subprocess
import sys

import pytest
import torch

import attnres_fx as ax
from attnres_fx.errors import SaveError
from tests.support.paths import ROOT
from tests.support.saved_models import Tower, converted

KILLED = """
import os, signal, sys, torch, attnres_fx as ax
from attnres_fx.conversion.stored import whole_file
from tests.support.saved_models import Tower
kind, place = sys.argv[1:]
whole_file.flush_to_disk = lambda path: os.kill(os.getpid(), signal.SIGKILL)
model = ax.convert(Tower(), (torch.randn(2, 5, 8),), check=False)
model.save(place) if kind == "model" else ax.plan(Tower(), (torch.randn(2, 5, 8),), num_stages=2).save(place)
"""


@pytest.mark.parametrize("kind", ["model", "plan"])
@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(kind, tmp_path):
    place = tmp_path / "file"
    x = torch.randn(2, 5, 8)
    if kind == "model":
        converted(Tower(), x).save(place)
    else:
        ax.plan(Tower(), (x,), num_stages=2).save(place)
    before = place.read_bytes()
    command = [sys.executable, "-c", KILLED, kind, str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == -9, done.stderr
    assert place.read_bytes() == before
    assert (ax.load if kind == "model" else ax.load_plan)(place)


def test_a_folder_that_is_not_there_is_named_and_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    one = converted(Tower(), torch.randn(2, 5, 8))
    with pytest.raises(SaveError, match="missing"):
        one.save(tmp_path / "missing" / "model.file")
    place = tmp_path / "model.file"
    one.save(place)
    before = place.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left"):
        one.save(place)
    assert place.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.file"]


def test_a_link_stays_a_link_and_keeps_its_permissions(tmp_path):
    one = converted(Tower(), torch.randn(2, 5, 8))
    place, link = tmp_path / "model.file", tmp_path / "link"
    one.save(place)
    place.chmod(0o640)
    link.symlink_to(place)
    one.save(link)
    assert link.is_symlink()
    assert place.stat().st_mode & 0o777 == 0o640


def test_the_file_is_data_that_other_programs_read(tmp_path):
    from safetensors import safe_open

    one = converted(Tower(), torch.randn(2, 5, 8))
    one.save(tmp_path / "model.file")
    with safe_open(tmp_path / "model.file", framework="pt") as file:
        assert torch.equal(file.get_tensor("mixes.0.weight"), one.mixes[0].weight)
        assert json.loads(file.metadata()["attnres_fx"])["format"] == 4


def test_files_of_torch_save_are_refused_by_name(tmp_path):
    torch.save({"about": json.dumps({"format": 2, "version": "0.1.0"})}, tmp_path / "old.pt")
    with pytest.raises(SaveError, match="before format 3"):
        ax.load(tmp_path / "old.pt")
