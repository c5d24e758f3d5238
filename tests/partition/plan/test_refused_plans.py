"""What no plan is made of, plans that are refused, and what the refusals say."""

import json
import math

import pytest
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import PlanError
from tests.support.small_stages import ZEROS, branches, planned


@pytest.fixture(scope="module")
def plan():
    return planned()


def edited(plan, path, change):
    plan.save(path)
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    return path


def test_files_that_are_no_whole_plan_are_refused(plan, tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="changed after it was written"):
        ax.load_plan(edited(plan, path, lambda f: f["plan"]["partition"]["starts"].__setitem__(1, 2)))
    with pytest.raises(PlanError, match="plan again with this version"):
        ax.load_plan(edited(plan, path, lambda f: f.__setitem__("format", 99)))
    with pytest.raises(PlanError, match="plan again with this version"):
        ax.load_plan(edited(plan, path, lambda f: f.__setitem__("version", "99.0")))
    plan.save(path)
    path.write_text(path.read_text()[:-300])
    with pytest.raises(PlanError, match="whole"):
        ax.load_plan(path)
    with pytest.raises(PlanError, match="is no file"):
        ax.load_plan(tmp_path / "missing.json")


@pytest.mark.slow
def test_another_model_is_refused_by_its_first_difference(plan):
    with pytest.raises(PlanError, match=r"8 sublayers and this model has 10"):
        ax.build_stages(branches(10), plan, check=False)
    with pytest.raises(PlanError, match=r"before.*differs"):
        ax.build_stages(branches(vocabulary=11), plan, check=False)
    changed = branches()
    changed.layers[3] = nn.Linear(8, 8, bias=False)
    with pytest.raises(PlanError, match=r"layers\.3.*number of parameter tensors"):
        ax.build_stages(changed, plan, check=False)


@pytest.mark.slow
def test_another_conversion_is_refused(plan):
    def converted(**config):
        return ax.convert(branches(), kwargs=ZEROS, config=ax.AttnResConfig(**config), check=False)

    with pytest.raises(PlanError, match="variant"):
        ax.build_stages(converted(variant="local", num_blocks=2), plan)
    with pytest.raises(PlanError, match="blocks"):
        ax.build_stages(converted(boundaries=(1,)), plan)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_stages": 5}, "more than the model's 8 sublayers"),
        ({"memory_limit": 1000}, "memory_limit"),
        ({"virtual_stages": 1, "num_microbatches": 1, "schedule": "1F1B"}, "microbatches"),
        ({"schedule": "1F1B"}, "virtual_stages"),
        ({"schedule": "2F2B"}, "2F2B"),
        ({"starts": (0, 2, 2, 4)}, "empty"),
        ({"starts": (0, 2)}, "2 stage starts"),
        ({"num_blocks": 9}, "num_blocks"),
        ({"num_blocks": 2, "config": ax.AttnResConfig(num_blocks=2)}, "both"),
        ({"num_blocks": 2, "config": ax.AttnResConfig(block_size=2)}, "config gives the blocks"),
        ({"num_blocks": 2, "config": ax.AttnResConfig(variant="full")}, "full"),
        ({"align": "maybe"}, "align"),
        ({"link_bandwidth": 0.0}, "link_bandwidth"),
        ({"optimizer_factor": math.nan}, "optimizer_factor"),
    ],
)
@pytest.mark.slow_after(1)
def test_what_no_plan_can_be_made_of_is_refused(options, said):
    with pytest.raises(PlanError, match=said):
        planned(**options)


@pytest.mark.slow
def test_the_memory_that_the_message_asks_for_is_enough():
    with pytest.raises(PlanError, match="memory_limit") as refused:
        planned(virtual_stages=1, memory_limit=1000)
    needed = int(str(refused.value).split("a rank needs ")[1].split()[0])
    assert max(planned(virtual_stages=1, memory_limit=needed).partition.memory_bytes) <= needed
    with pytest.raises(PlanError):
        planned(virtual_stages=1, memory_limit=needed - 1)


def test_what_cannot_be_captured_says_so():
    with pytest.raises(ax.errors.CaptureError, match="ids"):
        ax.plan(branches(), num_stages=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_stages": 2.5}, "num_stages must be a whole number"),
        ({"num_stages": True}, "num_stages must be a whole number"),
        ({"memory_limit": "80GB"}, "memory_limit"),
        ({"link_bandwidth": "50GB"}, "link_bandwidth"),
        ({"starts": 2}, "starts"),
        ({"starts": (0, 1.5, 2, 3)}, "starts"),
        ({"num_blocks": (1, 2, 3)}, "num_blocks"),
        ({"config": {}}, "config must be of type AttnResConfig"),
        ({"device": "cuda"}, "device must be of type DeviceSpeed"),
        ({"costs": "x"}, "costs must be of type ModelCosts"),
    ],
)
def test_options_of_another_kind_are_refused(options, said):
    with pytest.raises(PlanError, match=said):
        planned(**options)


@pytest.mark.slow
def test_plans_that_go_nowhere_say_so(plan, tmp_path):
    with pytest.raises(PlanError, match="cannot be written"):
        plan.save(tmp_path / "missing" / "plan.json")
    with pytest.raises(PlanError, match="cannot be drawn"):
        plan.plot(tmp_path / "plan.xyz")
    with pytest.raises(PlanError, match="load_plan"):
        ax.build_stages(branches(), "plan.json")
    with pytest.raises(PlanError, match="another model"):
        ax.build_stages(branches(2), plan)
    with pytest.raises(PlanError, match=r"differs|does not run"):
        ax.build_stages(branches().double(), plan, check=False)
