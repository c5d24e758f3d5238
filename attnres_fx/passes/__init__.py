"""Graph passes: find residual streams, plan who reads what, rewrite.

A pass is a function `verb_noun_pass(gm, *, options) -> PassResult`. It works in place on a graph that the
caller made for it, never on the user's module.
"""

from attnres_fx.passes.depth_source import Source
from attnres_fx.passes.graph.nodes import insert_call
from attnres_fx.passes.graph.operations import op_name
from attnres_fx.passes.graph.result import PassResult, run_pass
from attnres_fx.passes.lowering.block_cost import BlockReads, PhaseChoice, choose_phases
from attnres_fx.passes.lowering.fuse_norms import NormFusion, fuse_norms_pass, plan_norm_fusions
from attnres_fx.passes.lowering.fuse_partial_sums import SumFusion, fuse_partial_sums_pass, plan_sum_fusions
from attnres_fx.passes.lowering.lower import Lowering, checked_lowering, lower_
from attnres_fx.passes.lowering.two_phase import PhasePlan, plan_phases, two_phase_pass
from attnres_fx.passes.normalize.dead_code import remove_dead_code_pass
from attnres_fx.passes.normalize.functionalize import functionalize_mutations_pass
from attnres_fx.passes.normalize.inline_regions import inline_regions_pass
from attnres_fx.passes.normalize.new_rows import split_new_rows_pass
from attnres_fx.passes.normalize.normalization import NORMALIZATION, normalize_, propagate_values_
from attnres_fx.passes.normalize.rejoin_rows import rejoin_rows_pass
from attnres_fx.passes.normalize.undo_reshapes import undo_reshapes_pass
from attnres_fx.passes.normalize.unfold_row_writes import unfold_row_writes_pass
from attnres_fx.passes.normalize.unfuse_additions import unfuse_additions_pass
from attnres_fx.passes.rewrite.depth_attention import insert_depth_attention_pass
from attnres_fx.passes.rewrite.execution import Replacement, execute_plan
from attnres_fx.passes.rewrite.hyper_connections import HyperConnectionsConfig, insert_hyper_connections_pass
from attnres_fx.passes.rewrite.insertion import ReadParameters
from attnres_fx.passes.rewrite.planning import plan_depth_reads
from attnres_fx.passes.rewrite.read_plan import (
    BlockEnd,
    DepthReadPlan,
    ReadPlan,
    StreamPlan,
    TermPlan,
)
from attnres_fx.passes.rewrite.topology import Topology, register_topology, topology_of
from attnres_fx.passes.schedule import DepthSchedule, plan_schedule
from attnres_fx.passes.streams.analysis import analyze_
from attnres_fx.passes.streams.finding import find_streams
from attnres_fx.passes.streams.stream import Read, Stream, StreamSet, Term

__all__ = [
    "NORMALIZATION",
    "BlockEnd",
    "BlockReads",
    "DepthReadPlan",
    "DepthSchedule",
    "HyperConnectionsConfig",
    "Lowering",
    "NormFusion",
    "PassResult",
    "PhaseChoice",
    "PhasePlan",
    "Read",
    "ReadParameters",
    "ReadPlan",
    "Replacement",
    "Source",
    "Stream",
    "StreamPlan",
    "StreamSet",
    "SumFusion",
    "Term",
    "TermPlan",
    "Topology",
    "analyze_",
    "checked_lowering",
    "choose_phases",
    "execute_plan",
    "find_streams",
    "functionalize_mutations_pass",
    "fuse_norms_pass",
    "fuse_partial_sums_pass",
    "inline_regions_pass",
    "insert_call",
    "insert_depth_attention_pass",
    "insert_hyper_connections_pass",
    "lower_",
    "normalize_",
    "op_name",
    "plan_depth_reads",
    "plan_norm_fusions",
    "plan_phases",
    "plan_schedule",
    "plan_sum_fusions",
    "propagate_values_",
    "register_topology",
    "rejoin_rows_pass",
    "remove_dead_code_pass",
    "run_pass",
    "split_new_rows_pass",
    "topology_of",
    "two_phase_pass",
    "undo_reshapes_pass",
    "unfold_row_writes_pass",
    "unfuse_additions_pass",
]
