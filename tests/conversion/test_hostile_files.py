"""Files that anyone may have written: nothing runs or is imported, little is allocated, and no number is wrong."""

import copy
import hashlib
import io
import json
import random

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.conversion.adapter_folder import TENSOR_FILE
from attnres_fx.errors import PlanError, SaveError
from tests.conversion.test_adapter import X, converted, parameters, trained
from tests.support.damaged_files import described, places, saved, with_description
from tests.support.hostile_files import HUGE, PATHS, damaged, foreign, forged_containers, harmless

pytestmark = pytest.mark.slow
#: Large enough that what a file's tensors take can be told from what Python objects take.
WIDTH = 500
WIDE = torch.linspace(-1, 1, 2 * WIDTH).view(2, 1, WIDTH)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.last(x + self.mix(self.norm(x)))


def replaced(value, path, other):
    value = copy.deepcopy(value)
    target = value
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = other
    return value


def run_all(mutations, read, error, check):
    """Read each; `check` says of what was read whether it is right. Returns how many there were, and were refused."""
    count = refused = 0
    for what, data in mutations:
        count += 1
        with harmless(len(data), what):
            try:
                found = read(data)
            except error:
                refused, found = refused + 1, None
        assert found is None or check(found), what
    return count, refused


@pytest.mark.parametrize("way", ["path", "file object"])
def test_model_files(tmp_path, way):
    model = trained(ax.convert(Wide().eval(), (WIDE,), check=False))
    whole, right, place, draw = saved(model), model(WIDE), tmp_path / "model.file", random.Random(3)

    def read(data):
        if way == "file object":
            return ax.load(io.BytesIO(data))
        place.write_bytes(data)
        return ax.load(place)

    assert torch.equal(read(whole)(WIDE), right)  # imports what it needs
    mutations = [("as it was", whole), *damaged(whole, draw), *foreign(tmp_path / "mark"), *forged_containers(whole)]
    count, refused = run_all(mutations, read, SaveError, lambda found: torch.equal(found(WIDE), right))
    assert count > 270
    assert count * 0.9 < refused < count
    assert not (tmp_path / "mark").exists()


def test_model_files_that_say_other_things_with_a_right_checksum(tmp_path):
    """The sizes, names and devices of a description: nothing but memory that the file itself fills is taken."""
    model = trained(ax.convert(Wide().eval(), (WIDE,), check=False))
    whole, draw = saved(model), random.Random(4)
    about = described(whole)
    read = lambda data: ax.load(io.BytesIO(data))  # noqa: E731
    read(whole)
    everywhere = [p for p in places(about) if p[0] != "checksums"]
    mutations = []
    for i, path in enumerate(draw.sample(everywhere, 70)):
        other = [*HUGE, [HUGE[0]], [HUGE[1]] * 3, {"tuple": [HUGE[2]]}, *PATHS, "os:system", "torch:load"][i % 20]
        mutations.append((f"{path} = {other!r:.40}", with_description(whole, replaced(about, path, other))))
    count, refused = run_all(mutations, read, SaveError, lambda found: True)
    assert count == 70
    assert refused > 40


def test_adapter_folders(tmp_path):
    one, model, draw = trained(converted()), converted(), random.Random(5)
    folder = tmp_path / "adapter"
    ax.save_adapter(one, folder)
    config, tensors = folder / "attnres_config.json", folder / TENSOR_FILE
    text, whole, right = config.read_bytes(), tensors.read_bytes(), parameters(one)
    ax.load_adapter(model, folder)
    mark = tmp_path / "mark"

    def read(file, data):
        config.write_bytes(text)
        tensors.write_bytes(whole)
        with torch.no_grad():
            for parameter in model.attnres.parameters():
                parameter.zero_()
        file.write_bytes(data)
        ax.load_adapter(model, folder)
        return parameters(model)

    def is_right(found):
        return all(torch.equal(found[n], right[n]) for n in right if n.startswith("attnres."))

    about = json.loads(text)
    checksum = lambda data: json.dumps({**about, "checksum": hashlib.sha256(data).hexdigest()})  # noqa: E731
    for file, data, more in ((config, text, []), (tensors, whole, list(forged_containers(whole)))):
        mutations = [*damaged(data, draw), *foreign(mark), *more]
        count, refused = run_all(mutations, lambda d, file=file: read(file, d), SaveError, is_right)
        assert count >= 190
        assert refused > count * 0.9
    forged = 0
    for what, data in forged_containers(whole):  # with a checksum in the config that fits
        tensors.write_bytes(data)
        config.write_text(checksum(data))
        with harmless(len(data) + len(text), what):
            try:
                ax.load_adapter(model, folder)
            except SaveError:
                forged += 1
    assert forged > 60
    for path in PATHS:
        config.write_text(json.dumps({**about, "checksum": path}))
        with pytest.raises(SaveError):
            ax.load_adapter(model, folder)
    assert not mark.exists()
    assert model(X).shape == X.shape


def test_plan_files(tmp_path):
    path, draw = tmp_path / "plan.json", random.Random(6)
    ax.plan(Wide(), (WIDE,), num_stages=1).save(path)
    whole, right = path.read_bytes(), str(ax.load_plan(path))
    content = json.loads(whole)

    def read(data):
        path.write_bytes(data)
        return ax.load_plan(path)

    mutations = [("as it was", whole), *damaged(whole, draw), *foreign(tmp_path / "mark")]
    count, refused = run_all(mutations, read, PlanError, lambda plan: str(plan) == right)
    assert count > 190
    assert refused > count * 0.8

    def forged():
        for place in places(content["plan"]):
            for huge in draw.sample([*HUGE, [HUGE[0]], [HUGE[1]] * 3, *PATHS], 2):
                plan = replaced(content["plan"], place, huge)
                text = json.dumps(plan, sort_keys=True).encode()
                checksum = hashlib.sha256(text).hexdigest()[: len(content["checksum"])]
                yield f"{place} = {huge!r:.40}", json.dumps({**content, "plan": plan, "checksum": checksum}).encode()

    count, refused = run_all(forged(), read, PlanError, lambda plan: True)
    assert count > 200
    assert not (tmp_path / "mark").exists()
    with pytest.raises(PlanError, match="no file"):
        ax.load_plan("/dev/zero")
