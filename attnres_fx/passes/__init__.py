"""Graph passes: find residual streams, plan who reads what, rewrite.

A pass is a function `verb_noun_pass(gm, *, options) -> PassResult`. It works in place on a graph that the
caller made for it, never on the user's module.
"""

from attnres_fx.passes.depth_attention import (
    DepthReadPlan,
    ReadParameters,
    Replacement,
    insert_depth_attention_pass,
    plan_depth_reads,
)
from attnres_fx.passes.functionalize import functionalize_mutations_pass
from attnres_fx.passes.inline_regions import inline_regions_pass
from attnres_fx.passes.pipeline import NORMALIZATION, analyze_, normalize_, propagate_values_
from attnres_fx.passes.result import PassResult, run_pass
from attnres_fx.passes.schedule import DepthSchedule, Source, plan_schedule
from attnres_fx.passes.streams import Read, Stream, StreamSet, Term, find_streams
from attnres_fx.passes.unfuse_additions import unfuse_additions_pass

__all__ = [
    "NORMALIZATION",
    "DepthReadPlan",
    "DepthSchedule",
    "PassResult",
    "Read",
    "ReadParameters",
    "Replacement",
    "Source",
    "Stream",
    "StreamSet",
    "Term",
    "analyze_",
    "find_streams",
    "functionalize_mutations_pass",
    "inline_regions_pass",
    "insert_depth_attention_pass",
    "normalize_",
    "plan_depth_reads",
    "plan_schedule",
    "propagate_values_",
    "run_pass",
    "unfuse_additions_pass",
]
