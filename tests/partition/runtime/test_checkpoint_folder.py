"""Checkpoint folders: replaced as a whole, read as plain data, and refused by name where they are damaged."""

import hashlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from attnres_fx.errors import AttnResError, SaveError
from attnres_fx.partition import checkpoint_folder
from attnres_fx.partition.checkpoint import load_checkpoint, save_checkpoint
from tests.support.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model, optimizer):
    state = optimizer.state_dict()
    moments = [state["state"][i]["exp_avg"] for i in sorted(state["state"])]
    return [*model.state_dict().values(), *moments, torch.tensor(state["param_groups"][0]["lr"])]


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "c", *trained(0))
    return tmp_path / "c"


def test_another_save_leaves_one_checkpoint(folder):
    before = {path.name for path in folder.iterdir()}
    save_checkpoint(folder, *trained(1))
    after = {path.name for path in folder.iterdir()}
    assert len(after) == len(before) == 2 and before & after == {".metadata"}
    model, optimizer = trained(2)
    load_checkpoint(folder, model, optimizer)
    assert same(state_of(model, optimizer), state_of(*trained(1)))


@pytest.mark.parametrize("where", ["write_data", "finish"])
def test_a_save_that_fails_leaves_the_old_one(folder, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_folder.FileSystemWriter, where, full)
    with pytest.raises(SaveError, match=r"No space left.*|could not be written"):
        save_checkpoint(folder, *trained(1))
    monkeypatch.undo()
    model, optimizer = trained(2)
    load_checkpoint(folder, model, optimizer)
    assert same(state_of(model, optimizer), state_of(*trained(0)))


def test_step_scheduler_and_random_state_come_back(tmp_path):
    model, optimizer = trained(0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    optimizer.step()
    scheduler.step()
    save_checkpoint(tmp_path, model, optimizer, step=7, others={"scheduler": scheduler})
    drawn = torch.rand(4)
    again = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    loaded = load_checkpoint(tmp_path, model, optimizer, others={"scheduler": again}, random=True)
    assert (loaded.step, loaded.random) == (7, True)
    assert again.state_dict() == scheduler.state_dict() and torch.equal(torch.rand(4), drawn)
    before = torch.get_rng_state()
    assert load_checkpoint(tmp_path, model).step == 7 and torch.equal(torch.get_rng_state(), before)


def test_what_has_no_plain_state_is_refused_before_anything_is_written(tmp_path):
    class Odd:
        def __init__(self, held=None):
            self.held = held

        def state_dict(self):
            return {"held": self.held}

        def load_state_dict(self, state):
            pass

    for held in (trained, lambda: None, Odd()):  # pickled by name, not at all, and as an object
        with pytest.raises(SaveError, match="the state of 'odd' holds more than numbers"):
            save_checkpoint(tmp_path / "c", trained(0)[0], others={"odd": Odd(held)})
    with pytest.raises(AttnResError, match=r"others\['seven'\] is a int, which has no state_dict"):
        save_checkpoint(tmp_path / "c", trained(0)[0], others={"seven": 7})
    assert not (tmp_path / "c").exists()


def test_a_flipped_bit_is_found_before_anything_is_changed(folder):
    (file,) = folder.glob("*.distcp")
    data = bytearray(file.read_bytes())
    moment = trained(0)[1].state_dict()["state"][0]["exp_avg"].numpy().tobytes()
    data[data.index(moment) + 2] ^= 1
    file.write_bytes(data)
    model, optimizer = trained(2)
    before = [value.clone() for value in state_of(model, optimizer)]
    with pytest.raises(SaveError, match=r"checksum of 'optimizer\.state\.0\.weight\.exp_avg'"):
        load_checkpoint(folder, model, optimizer)
    assert same(before, state_of(model, optimizer))


KILLED = """
import sys, torch
from torch import nn
from attnres_fx.partition.checkpoint import save_checkpoint
for i in range(10_000):
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(i)
    save_checkpoint(sys.argv[1], model)
    print(i, flush=True)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path):
    draw = random.Random(5)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    for _ in range(60):  # frozen at many moments, which a kill would make the last
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(draw.uniform(0, 0.004))
        os.kill(process.pid, signal.SIGSTOP)
        model = nn.Linear(2, 2)
        load_checkpoint(tmp_path / "c", model)
        assert len({float(v) for p in model.parameters() for v in p.detach().flatten()}) == 1
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_with_the_losses_of_one_that_is_not(tmp_path):
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.killed_job", str(tmp_path / "jobs"), "--kills", "2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["kills"] == 2 and result["differ"] == [] and result["computed"] >= result["steps"]


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def refused(folder):
    model, optimizer = trained(2)
    with pytest.raises(AttnResError) as caught:
        load_checkpoint(folder, model, optimizer)
    return str(caught.value)


def metadata_of(folder):
    return FileSystemReader(folder).read_metadata()


def rewrite(folder, metadata):
    data = pickle.dumps(metadata)
    (folder / ".metadata").write_bytes(data + hashlib.sha256(data).digest())


def test_metadata_that_would_run_something(folder, tmp_path):
    metadata = metadata_of(folder)
    metadata.planner_data = Runs(tmp_path / "ran")
    rewrite(folder, metadata)
    assert "is no part of a checkpoint" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_an_option_that_would_run_something(folder, tmp_path):
    metadata = metadata_of(folder)
    index = next(i for i in metadata.storage_data if i.fqn.endswith(".lr"))
    written = io.BytesIO()
    torch.save(Runs(tmp_path / "ran"), written)
    info = metadata.storage_data[index]
    file = folder / info.relative_path
    info.offset, info.length = file.stat().st_size, len(written.getvalue())
    file.write_bytes(file.read_bytes() + written.getvalue())
    rewrite(folder, metadata)
    assert "is damaged" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_a_file_outside_of_the_folder(folder, tmp_path):
    metadata = metadata_of(folder)
    info = next(iter(metadata.storage_data.values()))
    (tmp_path / "other.distcp").write_bytes((folder / info.relative_path).read_bytes())
    info.relative_path = "../other.distcp"
    rewrite(folder, metadata)
    assert "not in the folder" in refused(folder)


def test_sizes_beyond_what_is_stored(folder):
    metadata = metadata_of(folder)
    what = metadata.state_dict_metadata["optimizer.state.0.weight.exp_avg"]
    what.size = torch.Size([10**6, 10**6])
    what.chunks[0].sizes = what.size
    rewrite(folder, metadata)
    assert "larger than what is stored" in refused(folder)


def test_a_piece_that_unpacks_to_more(folder):
    metadata = metadata_of(folder)
    index = next(i for i in metadata.storage_data if i.fqn == "model.0.weight")
    info = metadata.storage_data[index]
    file = folder / info.relative_path
    stored = zipfile.ZipFile(io.BytesIO(file.read_bytes()[info.offset : info.offset + info.length]))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in stored.namelist():
            archive.writestr(name, stored.read(name) + bytes(10**7))
    info.offset, info.length = file.stat().st_size, len(packed.getvalue())
    file.write_bytes(file.read_bytes() + packed.getvalue())
    rewrite(folder, metadata)
    assert "larger unpacked" in refused(folder)


@pytest.mark.slow
def test_damaged_bytes_are_refused_or_change_nothing(folder):
    """Bits flipped and files cut off: an error with a name, or the numbers that were saved."""
    right, draw, seen = state_of(*trained(0)), random.Random(7), {"refused": 0, "right": 0}
    load_checkpoint(folder, *trained(2))
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for i in range(60):
            data = bytearray(whole)
            if i % 4 == 3:
                del data[draw.randrange(len(data)) :]
            else:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
            model, optimizer = trained(2)
            try:
                load_checkpoint(folder, model, optimizer)
            except AttnResError:
                seen["refused"] += 1
            else:
                assert same(state_of(model, optimizer), right), (file.name, i)
                seen["right"] += 1
        file.write_bytes(whole)
    assert min(seen.values()) > 0
