"""A plan: blocks, stages, what they cost and what travels, as data that a file can hold and a person can read."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.plain_data import to_plain
from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.model_costs import DeviceSpeed, ModelCosts
from attnres_fx.partition.costs.stage_loads import stage_loads
from attnres_fx.partition.costs.traffic import Traffic, count_traffic, size, stage_values
from attnres_fx.partition.plan.fingerprint import ModelFingerprint, check_same_model
from attnres_fx.partition.plan.options import InputSpec, PlanOptions
from attnres_fx.partition.plan.plan_file import write_content
from attnres_fx.partition.plan.trace import write_trace
from attnres_fx.partition.planner.objective import Partition
from attnres_fx.partition.simulate.timeline import Timeline, simulate
from attnres_fx.partition.split.routes import StageValue
from attnres_fx.passes.schedule import DepthSchedule
from attnres_fx.report_page import ReportPage, Shown
from attnres_fx.state_config import differing_options


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Blocks and stages of a model; `print` it, `save` it, `plot` it, hand it to `build_stages`.

    Args:
        model: Names, counts and digests of the parameters of the model it was made for.
        config: The conversion, with the blocks chosen.
        options: What was asked for.
        device: Speeds of every rank.
        costs: Of the model, per microbatch.
        partition: Stages, blocks, seconds and bytes.
        values: Every tensor that leaves a stage, from the graph itself.
        inputs: The example microbatch.
        notes: Sentences for the reader of the table.
    """

    model: ModelFingerprint
    config: AttnResConfig
    options: PlanOptions
    device: DeviceSpeed
    costs: ModelCosts
    partition: Partition
    values: tuple[StageValue, ...]
    inputs: tuple[InputSpec, ...] = ()
    notes: tuple[str, ...] = ()

    # --- what it says

    @property
    def num_stages(self) -> int:
        """Ranks, P."""
        return self.options.num_stages

    @property
    def virtual_stages(self) -> int:
        """Stages on each rank, V."""
        return self.options.virtual_stages

    @property
    def schedule(self) -> str:
        """The schedule, by PyTorch's name."""
        return self.options.schedule

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one step."""
        return self.options.num_microbatches

    @property
    def starts(self) -> tuple[int, ...]:
        """First sublayer of every virtual stage."""
        return self.partition.starts

    @property
    def block_layouts(self) -> dict[str, DepthSchedule]:
        """Blocks of every stream, by its name."""
        return dict(self.partition.block_layouts)

    def rank_of(self, stage: int) -> int:
        """The rank that runs a virtual stage.

        Args:
            stage: Index of the virtual stage, 0 to P * V - 1.

        Returns:
            The rank, 0 to P - 1.
        """
        return stage % self.num_stages

    def stages_of(self, rank: int) -> range:
        """The virtual stages of a rank.

        Args:
            rank: 0 to P - 1.

        Returns:
            Indices of V virtual stages, ascending.
        """
        return range(rank, len(self.starts), self.num_stages)

    @cached_property
    def traffic(self) -> Traffic:
        """What travels over every hop, counted three ways."""
        return count_traffic(self.values, num_stages=self.num_stages, virtual_stages=self.virtual_stages)

    @cached_property
    def plain_traffic(self) -> Traffic:
        """What would travel in the model as it was, with plain residuals, over the same stages."""
        values = stage_values(self.costs.streams, None, self.starts, carried=self.costs.carried)
        return count_traffic(values, num_stages=self.num_stages, virtual_stages=self.virtual_stages)

    @cached_property
    def timeline(self) -> Timeline:
        """One step, simulated."""
        loads = stage_loads(
            self.costs,
            self.starts,
            self.block_layouts,
            num_stages=self.num_stages,
            device=self.device,
            cache=self.options.cache,
            recompute=self.options.recompute,
        )
        return simulate(
            loads,
            schedule=self.schedule,
            num_stages=self.num_stages,
            virtual_stages=self.virtual_stages,
            num_microbatches=self.num_microbatches,
        )

    # --- checks

    def check_model(self, model: ModelFingerprint) -> None:
        """Check that a model is the one that was planned for.

        Args:
            model: What `fingerprint` returns for it.

        Raises:
            PlanError: The models differ; the error names the first difference.
        """
        check_same_model(self.model, model)

    def check_config(self, config: AttnResConfig) -> None:
        """Check that a converted model reads its depth as planned.

        Args:
            config: The config that it was converted with.

        Raises:
            PlanError: They differ in more than the way they ask for blocks.
        """
        for name in differing_options(self.config, config)[:1]:
            ours, theirs = getattr(self.config, name), getattr(config, name)
            raise PlanError(
                f"the plan was made for {name}={ours!r} and the model was converted with {name}={theirs!r}: plan "
                f"again for this model, or convert the original with the plan's config."
            )

    # --- files

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, for `attnres_fx.load_plan`.

        Args:
            path: Of the file, which is replaced where there is one.

        Raises:
            PlanError: The file cannot be written.
        """
        content = {f.name: to_plain(getattr(self, f.name), error=PlanError) for f in dataclasses.fields(self)}
        content["config"] = dataclasses.asdict(self.config)
        write_content(content, path)

    # --- for people

    def table(self) -> str:
        """Stages with their blocks, times and bytes, then the speeds they come from, ranks and totals.

        Returns:
            The lines that `print(plan)` shows.
        """
        return str(self)

    def _page(self) -> ReportPage:
        part, options = self.partition, self.options
        head = (
            f"{self.model.model}, variant {self.config.variant}: {len(self.costs.sublayers)} sublayers on "
            f"{self.num_stages} ranks x {self.virtual_stages}, {self.schedule}, {self.num_microbatches} microbatches"
        )
        rows = [self._row(c) for c in range(len(self.starts))]
        memory = ", ".join(size(b) for b in part.memory_bytes)
        counts = self.traffic
        used = counts.exact if options.cache else counts.naive
        plain = self.plain_traffic.exact.total
        lines = [
            "",
            f"assumed of a rank: {self.device} (device=)",
            f"memory per rank: {memory}" + (f" (limit {size(options.memory_limit)})" if options.memory_limit else ""),
            f"traffic a microbatch, both ways: {size(used.total)} (naive {size(counts.naive.total)}, paper's cache "
            f"{size(counts.cached.total)}, plain residual {size(plain)}); fullest hop {size(used.peak)}",
            f"kept for other stages a microbatch, per rank: {', '.join(size(b) for b in counts.cache_bytes)}",
            f"step {_seconds(self.timeline.step_seconds)}, bubble {self.timeline.bubble:.1%}; slowest stage "
            f"{_seconds(part.slowest_seconds)}, at most {part.gap:.1%} above the best",
            *(f"note: {note}" for note in self.notes),
        ]
        return ReportPage((head,), rows, lines, right=_RIGHT)

    def _row(self, c: int) -> dict[str, str]:
        part, stop = self.partition, (*self.starts[1:], len(self.costs.sublayers))[c]
        return {
            "stage": str(c),
            "rank": str(self.rank_of(c)),
            "sublayers": f"{self.starts[c]}-{stop - 1}",
            "from": _shortened(self.costs.sublayers[self.starts[c]].name),
            "blocks": self._blocks(self.starts[c], stop),
            "forward ms": f"{part.forward_seconds[c] * 1e3:.4g}",
            "backward ms": f"{part.backward_seconds[c] * 1e3:.4g}",
            "sends": size(part.hop_forward_bytes[c]),
            "parameters": size(part.parameter_bytes[c]),
            "activations": size(part.activation_bytes[c]),
        }

    def _blocks(self, start: int, stop: int) -> str:
        """Blocks of a stage; `…` where one began before it or goes on after it."""
        labels = []
        for stream in self.costs.streams:
            schedule = self.block_layouts[stream.name]
            if schedule.variant == "full":
                continue
            inside = range(max(start, stream.first), min(stop, stream.first + stream.count))
            if inside:
                first, last = (schedule.block_of(i - stream.first) for i in (inside[0], inside[-1]))
                before = "" if inside[0] - stream.first in schedule.starts else "…"
                ends = inside[-1] + 1 - stream.first
                after = "" if ends == stream.count or ends in schedule.starts else "…"
                labels.append(before + (f"{first + 1}" if first == last else f"{first + 1}-{last + 1}") + after)
        return " ".join(labels) or "-"

    def plot(self, path: str | Path) -> None:
        """Draw stages, blocks and the simulated step.

        Args:
            path: Of the file; its suffix chooses one of matplotlib's formats.

        Raises:
            PlanError: matplotlib is not installed, or the file cannot be written.
        """
        from attnres_fx.partition.plan.plot_stage_map import StageMap
        from attnres_fx.partition.plan.plots import draw_plan

        stage_map = StageMap(self.costs.streams, self.block_layouts, self.starts, self.num_stages)
        try:
            draw_plan(self.timeline, stage_map, path)
        except (OSError, ValueError) as error:
            raise PlanError(f"the plan cannot be drawn to {str(path)!r}: {error}.") from error

    def save_trace(self, path: str | Path) -> None:
        """Write the simulated step as a trace for chrome://tracing or ui.perfetto.dev.

        Args:
            path: Of the JSON file. Ranks are tracks, and so are the links between them.

        Raises:
            PlanError: The file cannot be written.
        """
        try:
            write_trace(self.timeline, path)
        except OSError as error:
            raise PlanError(f"the trace cannot be written to {str(path)!r}: {error}.") from error


_RIGHT = ("stage", "rank", "forward ms", "backward ms", "sends", "parameters", "activations")


def _seconds(count: float) -> str:
    for unit, one in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if count >= one:
            return f"{count / one:.4g} {unit}"
    return f"{count * 1e9:.4g} ns"


def _shortened(name: str, length: int = 34) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"
