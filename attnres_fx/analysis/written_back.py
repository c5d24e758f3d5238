"""How far back the sources of a read were written."""

from attnres_fx.passes.depth_source import Source
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan
from attnres_fx.passes.schedule import DepthSchedule


def written_back(read: DepthReadPlan, schedule: DepthSchedule) -> tuple[float, ...]:
    """How many sublayers were written after each source of a read.

    Args:
        read: What was planned.
        schedule: The blocks of its stream.

    Returns:
        [S], in the order of its sources: 0 for what was written last, and for what is no part of the chain; the mean
        over its sublayers for a sum of several.
    """
    seen = (read.position - _written(source, schedule) for source in read.seen)
    return (*seen, *(0.0 for _ in read.extras))


def _written(source: Source, schedule: DepthSchedule) -> float:
    """How many sublayers were written when a source was, itself among them."""
    if source.kind == "root":
        return 0.0
    if source.kind == "summary":
        return float(schedule.starts[source.block])
    return (source.start + 1 + source.stop) / 2
