"""Loads of stages: operations, reads and hops at the device's speed."""

import pytest

from attnres_fx.config import AttnResConfig
from attnres_fx.partition import DeviceSpeed, ModelCosts, StreamCost, SublayerCost
from attnres_fx.partition.costs.stage_loads import stage_loads
from attnres_fx.passes.schedule import plan_schedule


def small_costs():
    sublayers = tuple(SublayerCost(f"s{i}", 100.0, 200.0, 0, 10 + i) for i in range(4))
    before, after = SublayerCost("before", 8.0, 16.0, 0, 1), SublayerCost("after", 40.0, 80.0, 0, 2)
    return ModelCosts(sublayers, before, after, (StreamCost("main", 0, 4, 6),))


SPEED = DeviceSpeed(flops=100.0, memory_bandwidth=6.0, link_bandwidth=2.0, link_latency=0.25)


def test_loads_are_operations_reads_and_hops_at_the_devices_speed():
    costs = small_costs()
    schedules = {"main": plan_schedule(4, AttnResConfig(block_size=2))}
    first, second = stage_loads(costs, (0, 2), schedules, num_stages=2, device=SPEED)
    # Reads: position 1 in the first stage; 2, 3 and the last, 4, in the second; 2, 2, 3 and 3 sources.
    assert first.forward == pytest.approx(2.08 + 3)
    assert second.forward == pytest.approx(2.4 + 3 + 4 + 4)
    assert first.backward_input == pytest.approx(4.16 / 2 + 7)
    assert second.backward_input == pytest.approx(4.8 / 2 + 7 + 10 + 10)
    assert (first.backward_weight, second.backward_weight) == pytest.approx((2.08, 2.4))
    assert (first.send_forward, second.send_forward) == (0.25 + 12 / 2, 0.0)
    assert (first.send_backward, second.send_backward) == (0.0, 0.25 + 12 / 2)
    assert (first.activation_bytes, second.activation_bytes) == (1 + 10 + 11, 12 + 13 + 2)
    assert (first.received_bytes, first.produced_bytes) == (0, 12)
    assert (second.received_bytes, second.produced_bytes) == (12, 0)


def test_in_local_the_read_at_a_blocks_end_is_paid_by_the_stage_before():
    costs = small_costs()
    schedules = {"main": plan_schedule(4, AttnResConfig(variant="local", block_size=2))}
    first, second = stage_loads(costs, (0, 2), schedules, num_stages=2, device=SPEED)
    assert first.forward == pytest.approx(2.08 + 3 + 4)
    assert second.forward == pytest.approx(2.4 + 3 + 4)


def test_the_plain_residual_has_no_reads_and_without_a_cache_hops_carry_all():
    costs = small_costs()
    assert stage_loads(costs, (0, 2), None, num_stages=2, device=SPEED)[0].forward == pytest.approx(2.08)
    schedules = {"main": plan_schedule(4, AttnResConfig(variant="full"))}
    loads = stage_loads(costs, (0, 1, 2, 3), schedules, num_stages=2, device=SPEED, cache=False)
    assert [n.received_bytes for n in loads] == [0, 12, 18, 24]
    cached = stage_loads(costs, (0, 1, 2, 3), schedules, num_stages=2, device=SPEED)
    assert [n.received_bytes for n in cached] == [0, 12, 6, 6]
    assert loads[0] == cached[0]
