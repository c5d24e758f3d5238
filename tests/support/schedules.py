"""Pipeline schedules by how many stages they give a rank, and steps of equal stages."""

from attnres_fx.partition.costs.stage_loads import StageLoad
from attnres_fx.partition.pipeline_schedule import PipelineSchedule
from attnres_fx.partition.simulate.timeline import simulate

#: One stage a rank.
SINGLE = tuple(s.value for s in PipelineSchedule if s.single_stage)
#: Several stages a rank.
MULTI = tuple(s.value for s in PipelineSchedule if not s.single_stage)
EVEN = StageLoad(1.0, 1.0, 1.0)


def even_step(schedule, ranks, rounds, microbatches, load=EVEN):
    how = {"schedule": schedule, "num_stages": ranks, "virtual_stages": rounds, "num_microbatches": microbatches}
    return simulate([load] * (ranks * rounds), **how)
