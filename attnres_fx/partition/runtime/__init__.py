"""From a plan and a rank to a pipeline that trains: stages, sources, loss, tied parameters, data parallelism.

`torch.distributed.pipelining` runs the schedule; the routes of the stages say which values travel. Needs torch 2.13.
"""

from attnres_fx.partition.runtime.build import build_pipeline, check_torch
from attnres_fx.partition.runtime.pipeline import Evaluation, Pipeline

__all__ = ["Evaluation", "Pipeline", "build_pipeline", "check_torch"]
