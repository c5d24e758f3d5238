"""Ranks that were not given the same."""

import torch.distributed as dist

from attnres_fx.config import AttnResConfig
from attnres_fx.partition.runtime import build_pipeline
from attnres_fx.state_config import MadeFor
from tests.support.pipeline_cases.tools import case, compared, refusal
from tests.support.pipeline_model import HandPlan, HandStages, batch, loss_fn, whole


@case("two")
def ranks_that_differ():
    rank, model, (ids, target) = dist.get_rank(), whole(), batch(8)

    def built(output="sum", **options):
        stages = HandStages(model, 2, 1)
        stages.made_for = MadeFor(AttnResConfig(output=output))
        plan = HandPlan(2, 1, "1F1B", options.pop("microbatches", 4))
        return build_pipeline(stages, plan, loss_fn=loss_fn, compile=False, **options)

    pipeline = built()
    rows = 8 - 4 * rank
    return {
        "config": refusal(lambda: built(output=("sum", "mean")[rank])),
        "plan": refusal(lambda: built(microbatches=(4, 8)[rank])),
        "options": refusal(lambda: built(ignore_index=(-100, -1)[rank])),
        "rows": refusal(lambda: pipeline.step(ids[:rows], target=target[:rows])),
        "mode": refusal(lambda: (pipeline.step, pipeline.evaluate)[rank](ids, target=target)),
        "after": compared(pipeline, model, ids, target),
    }
