"""From a plan and a rank to a pipeline that trains: stages, sources, loss, tied parameters, data parallelism.

`torch.distributed.pipelining` runs the schedule; which values travel is the routes' business. Needs torch 2.13.
"""

from attnres_fx.partition.runtime.build_pipeline import build_pipeline, check_torch
from attnres_fx.partition.runtime.pipeline import Evaluation, Pipeline

__all__ = ["Evaluation", "Pipeline", "build_pipeline", "check_torch"]
