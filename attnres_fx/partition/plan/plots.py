"""The plot of a plan: which stage runs which sublayers of which block, above its timeline.

matplotlib (extra `plot`) is imported when something is drawn, never through pyplot: no window, no global state.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from attnres_fx.errors import PlanError
from attnres_fx.partition.plan.plot_stage_map import StageMap, draw_stage_map, stage_map_height
from attnres_fx.partition.plan.plot_style import WIDTH_INCHES
from attnres_fx.partition.plan.plot_timeline import draw_timeline, timeline_height
from attnres_fx.partition.simulate.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_plan(timeline: Timeline, stage_map: StageMap, path: str | Path) -> None:
    """Write one plot of both, the map above the timeline.

    Args:
        timeline: Of one step.
        stage_map: The chain, its blocks and its cuts.
        path: Of the file; its suffix chooses the format.

    Raises:
        PlanError: matplotlib is not installed.
    """
    heights = [stage_map_height(stage_map), timeline_height(timeline)]
    figure = _figure(sum(heights))
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    draw_stage_map(stage_map, upper)
    draw_timeline(timeline, lower)
    figure.savefig(path, dpi=150)


def _figure(height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError(
            "a picture needs matplotlib, which is not installed: pip install 'attnres-fx[plot]', or leave the plot out."
        ) from error
    return Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
