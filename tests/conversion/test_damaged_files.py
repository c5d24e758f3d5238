"""Saved models and adapters that are damaged: SaveError each time, and nothing of a file is run or imported."""

import io
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnres_fx as ax
from attnres_fx.errors import SaveError
from tests.support.damaged_files import changed, described, outcome, places, saved, with_description


class Net(nn.Module):
    """A checkpointed branch with dropout, a buffer that is written, and a result in a structure."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.mix, self.last = nn.LayerNorm(width), nn.Linear(width, width), nn.LayerNorm(width)
        self.register_buffer("seen", torch.zeros(width))

    def branch(self, x):
        return F.dropout(self.mix(self.norm(x)), 0.1, self.training)

    def forward(self, x):
        self.seen.add_(1)
        h = x + checkpoint(self.branch, x, use_reentrant=False)
        return {"hidden": self.last(h), "rest": [h.sum(), (x[:, :1],)]}


@pytest.fixture(scope="module")
def file():
    data = saved(ax.convert(Net(), (torch.randn(2, 6, 8),), check=False))
    assert outcome(data) == "loaded"
    assert outcome(with_description(data, described(data))) == "loaded"
    return data


def test_any_flipped_byte_is_a_save_error(file):
    header = int.from_bytes(file[:8], "little")
    end = len(file[: 8 + header].rstrip(b" "))
    rest = [*range(end), *range(8 + header, len(file))]  # between them is padding
    draw = random.Random(0)
    for at in draw.sample(rest, 150):
        data = bytearray(file)
        data[at] ^= 1 << draw.randrange(8)
        assert outcome(bytes(data)) == "SaveError", f"byte {at} of {len(file)}"


def test_a_file_cut_anywhere_is_a_save_error(file):
    for at in (0, 1, 7, 8, 9, 100, len(file) // 3, len(file) - 1):
        assert outcome(file[:at]) == "SaveError", at
    assert outcome(file + b"more") == "SaveError"


@pytest.mark.slow
def test_a_changed_description_with_a_right_checksum_is_a_save_error_or_a_model(file):
    draw = random.Random(0)
    about = described(file)
    everywhere = list(places(about))
    refused = 0
    for path in draw.sample(everywhere, 300):
        other, what = changed(about, path, draw)
        found = outcome(with_description(file, other))
        assert found in ("SaveError", "loaded"), what
        refused += found == "SaveError"
    assert refused > 200


@pytest.mark.parametrize("entry", ["version", "training", "report", "reads", "programs", "tensors", "checksums"])
def test_every_entry_is_needed_and_named(file, entry):
    about = described(file)
    del about[entry]
    with pytest.raises(SaveError, match=f"lacks '{entry}'"):
        ax.load(io.BytesIO(with_description(file, about)))


EVIL = 'x"); __import__("os").mkdir("mark"); ("'


@pytest.mark.parametrize("key", ["name", "target"])
@pytest.mark.parametrize("op", ["placeholder", "get_attr", "call_method", "call_function"])
def test_no_name_in_a_graph_becomes_code(file, op, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = described(file)
    node = next(n for n in about["programs"][0]["graph"]["nodes"] if n["op"] == op) if op != "call_method" else None
    if node is None:
        node = about["programs"][0]["graph"]["nodes"][-2]
        node["op"], node["target"] = op, "contiguous"
    for text in (EVIL, "a=__import__('os').mkdir('mark')", "__class__", "a.__globals__", "a b", "lambda: 0"):
        node[key] = text
        assert outcome(with_description(file, about)) == "SaveError", text
    assert not list(tmp_path.iterdir())


def test_no_keyword_or_constant_becomes_code(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = described(file)
    node = next(n for n in about["programs"][0]["graph"]["nodes"] if n["op"] == "call_function")
    node["kwargs"] = {"a=__import__('os').mkdir('mark')": 1}
    assert outcome(with_description(file, about)) == "SaveError"
    node["kwargs"] = {"a": EVIL, "b": "'); import os; os.mkdir('mark') #"}
    outcome(with_description(file, about))
    assert not list(tmp_path.iterdir())


def test_conditions_on_sizes_are_no_code_and_cost_nothing(file):
    about = described(file)
    for condition in ("__import__('os')", ["eval", "1"], ["Pow", 10, 10**9], ["Eq", "nowhere", 1], [["Eq"], 1], 1.5):
        about["programs"][0]["guards"]["conditions"] = [condition]
        assert outcome(with_description(file, about)) == "SaveError", condition


def test_a_write_goes_to_tensors_of_the_model_alone(file):
    about = described(file)
    outputs = about["programs"][0]["graph"]["nodes"][-1]["args"][0]["tuple"]
    outputs.append(outputs[0])
    write = {"module": "", "name": "cache", "buffer": False, "output": len(outputs) - 1}
    about["programs"][0]["writes"] = [write]
    assert outcome(with_description(file, about)) == "loaded"
    for change in ({"name": "forward"}, {"name": "__class__"}, {"buffer": True}, {"module": "nowhere"}, {"output": 99}):
        about["programs"][0]["writes"] = [{**write, **change}]
        assert outcome(with_description(file, about)) == "SaveError", change


@pytest.mark.slow
def test_modules_and_pickles_beside_a_file_are_left_alone(file, tmp_path):
    (tmp_path / "modeling_extras.py").write_text("import os\nos.mkdir('mark')\n")
    about = described(file)
    about["programs"][0]["out_spec"] = {
        "class": "modeling_extras:Output",
        "children": ["leaf", "leaf", "leaf"],
        "about": ["a", "b", "c"],
    }
    (tmp_path / "model.file").write_bytes(with_description(file, about))
    code = "import attnres_fx as ax, torch; m = ax.load('model.file'); print(sorted(m(torch.randn(2, 6, 8))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "['a', 'b', 'c']", done.stderr
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 64, b"PK\x03\x04 not a zip", b"\xff" * 100])
def test_what_is_no_file_of_a_model_is_a_save_error(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    for source in (tmp_path / "file", str(tmp_path / "file"), io.BytesIO(content)):
        with pytest.raises(SaveError):
            ax.load(source)
    with pytest.raises(SaveError, match="no file"):
        ax.load(tmp_path)
