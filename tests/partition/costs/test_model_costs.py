"""Costs and speeds as data: to JSON and back, and refused by name where they cannot be."""

import dataclasses
import json
import math

import numpy as np
import pytest

import attnres_fx as ax
from attnres_fx.conversion.plain_data import from_plain, to_plain
from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.model_costs import CarriedValue, DeviceSpeed, ModelCosts, StreamCost, SublayerCost
from tests.support.measured import gpt_costs


def given():
    unit = SublayerCost("layers.0", 1e12, 2e12, 1000, 500)
    return ModelCosts(
        sublayers=tuple(dataclasses.replace(unit, name=f"layers.{i}") for i in range(3)),
        before=dataclasses.replace(unit, name="before"),
        after=dataclasses.replace(unit, name="after"),
        streams=(StreamCost("encoder", 0, 1, 64), StreamCost("decoder", 1, 2, 32)),
        carried=(CarriedValue("mask", 12, 0, (1, 2), False), CarriedValue("keys", 12, -1, (2,))),
        tied=((1000, ("before", "after")), (8, ("0", "2"))),
    )


def test_costs_survive_json():
    for one in (gpt_costs(), given()):
        assert (
            from_plain(ModelCosts, json.loads(json.dumps(to_plain(one, error=PlanError))), "costs", error=PlanError)
            == one
        )
    plain = to_plain(given(), error=PlanError)
    del plain["carried"], plain["tied"]
    assert from_plain(ModelCosts, plain, "costs", error=PlanError) == dataclasses.replace(given(), carried=(), tied=())


NOT_COUNTS = [-2, -2.0, 1.5, math.nan, math.inf, -math.inf, 10**400, "12", True, None, [1], (1,), 1j]
RECORDS = {
    "sublayers": ("forward_flops", "backward_flops", "parameter_bytes", "activation_bytes"),
    "streams": ("first", "count", "value_bytes"),
    "carried": ("bytes", "used", "differentiable", "produced"),
}
LEGAL = {"forward_flops": [1.5], "backward_flops": [1.5], "differentiable": [True], "used": [(1,), [1]]}


@pytest.mark.parametrize(("field", "name"), [(field, name) for field, names in RECORDS.items() for name in names])
def test_costs_of_another_kind_are_refused_when_they_are_made(field, name):
    record = getattr(given(), field)[0]
    for value in NOT_COUNTS:
        if any(value is fine or (value == fine and type(value) is type(fine)) for fine in LEGAL.get(name, ())):
            continue
        with pytest.raises(ax.errors.PlanError, match=rf"{name} of {record.name!r}") as refused:
            dataclasses.replace(record, **{name: value})
        assert repr(value)[:40] in str(refused.value)


@pytest.mark.parametrize("name", ["flops", "memory_bandwidth", "link_bandwidth", "link_latency"])
def test_speeds_of_another_kind_are_refused_when_they_are_made(name):
    for value in [*NOT_COUNTS, *([0.0] if name != "link_latency" else [])]:
        if value != 1.5:
            with pytest.raises(ax.errors.PlanError, match=rf"DeviceSpeed\.{name} must be"):
                DeviceSpeed(**{name: value})


def test_numbers_of_numpy_and_whole_floats_are_taken_as_plain_ones():
    unit = SublayerCost("layers.0", np.float32(2.0), 3, np.int64(1000), 5e2)
    assert unit == SublayerCost("layers.0", 2.0, 3.0, 1000, 500)
    assert [type(v) for v in dataclasses.astuple(unit)] == [str, float, float, int, int]
    assert json.dumps(to_plain(DeviceSpeed(flops=np.float64(1e12), link_bandwidth=10**9), error=PlanError))
    carried = CarriedValue("keys", np.int32(12), np.int64(0), [np.int64(1), 2])
    assert carried == CarriedValue("keys", 12, 0, (1, 2))


NONSENSE = {
    "no costs": ({"sublayers": {"a": 1}}, r"ModelCosts\.sublayers"),
    "text for costs": ({"sublayers": "abc"}, r"ModelCosts\.sublayers"),
    "other records": ({"sublayers": (StreamCost("a", 0, 3, 1),) * 3}, r"ModelCosts\.sublayers\[0\]"),
    "no record": ({"before": None}, r"ModelCosts\.before"),
    "nothing after": ({"after": 3}, r"ModelCosts\.after"),
    "no streams": ({"streams": ()}, "give one each"),
    "streams with a gap": ({"streams": (StreamCost("a", 0, 1, 1), StreamCost("b", 2, 1, 1))}, "without gaps"),
    "too few sublayers": ({"streams": (StreamCost("a", 0, 1, 1),)}, "give one each"),
    "two streams of one name": ({"streams": (StreamCost("a", 0, 1, 1), StreamCost("a", 1, 2, 1))}, "'a' twice"),
    "used nowhere in the chain": ({"carried": (CarriedValue("mask", 1, 0, (9,)),)}, "not come after the last"),
    "made nowhere in the chain": ({"carried": (CarriedValue("mask", 1, 8, ()),)}, "not come after the last"),
    "carried as text": ({"carried": "mask"}, r"ModelCosts\.carried"),
    "tied to a place that is not there": ({"tied": ((1, ("before", "7")),)}, "index of a sublayer"),
    "tied to itself": ({"tied": ((1, ("before",)),)}, "two places"),
    "tied without bytes": ({"tied": ((("0", "1"),),)}, "bytes and a tuple of places"),
    "tied with negative bytes": ({"tied": ((-1, ("0", "1")),)}, r"ModelCosts\.tied\[0\]\[0\]"),
    "tied to numbers": ({"tied": ((1, (0, 1)),)}, r"ModelCosts\.tied\[0\]\[1\]"),
    "tied as a number": ({"tied": 3}, r"ModelCosts\.tied"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_in_given_costs_is_named(case):
    fields, message = NONSENSE[case]
    with pytest.raises(ax.errors.PlanError, match=message):
        dataclasses.replace(given(), **fields)


def test_a_value_is_used_after_it_is_made():
    with pytest.raises(ax.errors.PlanError, match="must ascend and come after sublayer 0"):
        CarriedValue("mask", 12, 0, (0, 1))


def test_names_of_costs_are_texts():
    for kind, rest in ((SublayerCost, (1, 1, 1, 1)), (StreamCost, (0, 1, 1)), (CarriedValue, (1, 0, (1,)))):
        with pytest.raises(ax.errors.PlanError, match=rf"{kind.__name__}\.name must be a text; it is 3"):
            kind(3, *rest)


def test_entries_of_costs_that_are_missing_or_unknown_are_named():
    costs = to_plain(given(), error=PlanError)
    del costs["sublayers"][2]["parameter_bytes"]
    with pytest.raises(ax.errors.AttnResError, match=r"sublayers\[2\].*parameter_bytes"):
        from_plain(ModelCosts, costs, "costs", error=PlanError)
    costs = to_plain(given(), error=PlanError)
    costs["sublayers"][0]["speed"] = 3
    with pytest.raises(ax.errors.AttnResError, match="unknown entry 'speed'"):
        from_plain(ModelCosts, costs, "costs", error=PlanError)
    for wrong in ({}, []):
        with pytest.raises(ax.errors.AttnResError, match="costs"):
            from_plain(ModelCosts, wrong, "costs", error=PlanError)
