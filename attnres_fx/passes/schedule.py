"""Which source each read sees: the one description of depth connectivity.

Pure Python, no graph and no torch. The rewrite, the planner and the traffic model all ask here.

A stream of L sublayers has L + 1 read positions: position l is read with l sublayers written. Position
0 sees only the root and needs no operator; position L is the last read, before the final norm.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from attnres_fx.config import AttnResConfig, Variant
from attnres_fx.errors import ScheduleError
from attnres_fx.passes.depth_source import ROOT, Source, SourceSpan, Window

DEFAULT_BLOCKS = 8


@dataclass(frozen=True)
class DepthSchedule:
    """Blocks of one stream, and what each read position sees (arXiv 2603.15031, section 3.2).

    Attributes:
        variant: The variant the sources follow.
        starts: First sublayer of each block, from 0; `starts[0] == 0`.
        num_sublayers: L.
        window: What a read sees of its sources; None for all. Not in the variant `local`.
    """

    variant: Variant
    starts: tuple[int, ...]
    num_sublayers: int
    window: Window | None = None

    @property
    def num_blocks(self) -> int:
        """How many blocks the stream has."""
        return len(self.starts)

    @cached_property
    def blocks(self) -> tuple[range, ...]:
        """The sublayers of each block."""
        stops = (*self.starts[1:], self.num_sublayers)
        return tuple(range(a, b) for a, b in zip(self.starts, stops, strict=True))

    def block_of(self, sublayer: int) -> int:
        """Index of the block that `sublayer` is in.

        Args:
            sublayer: From 0 to L - 1.

        Returns:
            From 0 to `num_blocks - 1`.

        Raises:
            ScheduleError: There is no such sublayer.
        """
        if not 0 <= sublayer < self.num_sublayers:
            raise ScheduleError(f"sublayer {sublayer} does not exist: there are {self.num_sublayers}.")
        return bisect_right(self.starts, sublayer) - 1

    def group_of(self, sublayer: int) -> Source:
        """The group of sources that a sublayer's output belongs to: its block's sum, or itself.

        Args:
            sublayer: From 0 to L - 1.

        Returns:
            The block as a source in the variant `block`, else the sublayer.

        Raises:
            ScheduleError: There is no such sublayer.
        """
        block = self.block_of(sublayer)
        return Source("block", block) if self.variant == "block" else Source("sublayer", block, sublayer, sublayer + 1)

    def block_of_read(self, position: int) -> int:
        """Block that the read at `position` belongs to: the one whose outputs it is the last to see.

        Args:
            position: Sublayers written before the read, 0 to L.

        Returns:
            Index of the block.

        Raises:
            ScheduleError: There is no such position.
        """
        return self.block_of(max(position - 1, 0) if position >= 0 else position)

    def sources(self, position: int) -> tuple[Source, ...]:
        """Sources of the read at `position`, oldest first.

        Args:
            position: Sublayers written before the read, 0 to L.

        Returns:
            The S sources; the root alone at position 0.

        Raises:
            ScheduleError: There is no such position.
        """
        if not 0 <= position <= self.num_sublayers:
            raise ScheduleError(
                f"read position {position} does not exist: {self.num_sublayers} sublayers have "
                f"{self.num_sublayers + 1} read positions."
            )
        every = self._every_source(position)
        return every if self.window is None else self.window.seen(every)

    def _every_source(self, position: int) -> tuple[Source, ...]:
        """The sources of a read without a window."""
        if position == 0:
            return (ROOT,)
        if self.variant == "full":
            return (ROOT, *(Source("sublayer", self.block_of(i), i, i + 1) for i in range(position)))
        block = self.block_of_read(position)
        start = self.starts[block]
        if self.variant == "local":
            own = (Source("sublayer", block, i, i + 1) for i in range(start, position))
            return (Source("summary", block) if block else ROOT, *own)
        done = tuple(Source("block", i, b.start, b.stop) for i, b in enumerate(self.blocks) if b.stop <= position)
        current = () if self._finishes_block(position) else (Source("partial", block, start, position),)
        return (ROOT, *done, *current)

    def sees_whole_state(self, position: int) -> bool:
        """Whether the sources of a post-norm stream's read add up to the state that it stands at.

        They do where one sublayer was added to a source that is there by itself: the root, or a summary.

        Args:
            position: Sublayers written before the read, 1 to L.
        """
        begins = self.starts[self.block_of_read(position)] if self.variant == "local" else 0
        return position - begins == 1

    def num_sources(self, position: int) -> int:
        """`len(sources(position))`, without making them.

        Args:
            position: Sublayers written before the read, 0 to L.

        Returns:
            S, at least 1.
        """
        if position == 0:
            return 1
        block = self.block_of_read(position)
        if self.variant == "full":
            every = position + 1
        else:
            every = position - self.starts[block] + 1 if self.variant == "local" else block + 2
        return every if self.window is None else self.window.count(every)

    def summary_at(self, position: int) -> Source | None:
        """The summary that the read at `position` makes for the next block.

        Args:
            position: Sublayers written before the read, 0 to L.

        Returns:
            The summary as a source; None where no block of `local` ends.
        """
        if self.variant == "local" and 0 < position < self.num_sublayers and self._finishes_block(position):
            return Source("summary", self.block_of(position))
        return None

    def ends_block(self, position: int) -> bool:
        """Whether the read at `position` makes the summary that the next block receives.

        Args:
            position: Sublayers written before the read, 0 to L.

        Returns:
            True at the end of every block of `local` but the last; False everywhere else.
        """
        return self.summary_at(position) is not None

    def reader_of(self, position: int) -> int:
        """The sublayer whose pipeline stage runs the read at `position`.

        It is the sublayer that the read opens, or, for the last read and for those that end a block of `local`, the
        one before it.

        Args:
            position: Sublayers written before the read, 1 to L.

        Returns:
            Index of the sublayer.
        """
        return position - 1 if position == self.num_sublayers or self.ends_block(position) else position

    def carried(self, position: int) -> tuple[Source, ...]:
        """What must cross a cut at `position`: enough for every later read, and no more.

        In `local` the read at a block's end belongs to the earlier side, so one summary crosses there.

        Args:
            position: Sublayers before the cut, 0 to L.

        Returns:
            The sources that cross, oldest first.

        Raises:
            ScheduleError: There is no such position.
        """
        summary = self.summary_at(position)
        return self.sources(position) if summary is None else (summary,)

    @cached_property
    def spans(self) -> tuple[SourceSpan, ...]:
        """Every source that crosses some cut, and which cuts: `carried`, read source by source."""
        end, found = self.num_sublayers - 1, []
        if self.variant == "local":
            for block, own in enumerate(self.blocks):
                received = Source("summary", block) if block else ROOT
                found.append(SourceSpan(received, self.maker_of(received), own.stop - 1))
                found += (SourceSpan(Source("sublayer", block, i, i + 1), i, own.stop - 1) for i in own)
        else:
            found.append(SourceSpan(ROOT, 0, end))
            for block, own in enumerate(self.blocks):
                kind: Literal["sublayer", "block"] = "sublayer" if self.variant == "full" else "block"
                found.append(SourceSpan(Source(kind, block, own.start, own.stop), own.stop - 1, end))
                found += (SourceSpan(Source("partial", block, own.start, i + 1), i, i + 1) for i in own[:-1])
        if self.window is not None:
            # A source that has left the window is seen by no later read, so it crosses no later cut.
            last = {source: cut for cut in range(1, self.num_sublayers) for source in self.sources(cut)}
            found = [span._replace(last=min(span.last, last.get(span.source, 0))) for span in found]
        return tuple(span for span in found if span.last > span.maker)

    def maker_of(self, source: Source) -> int:
        """The sublayer after which a source is there; the root counts as made beside the first.

        Args:
            source: A source of this schedule.

        Returns:
            Index of the sublayer.
        """
        return self.starts[source.block] - 1 if source.kind == "summary" else max(source.stop - 1, 0)

    def _finishes_block(self, position: int) -> bool:
        return position == self.num_sublayers or position in self.starts


def plan_schedule(num_sublayers: int, config: AttnResConfig) -> DepthSchedule:
    """Blocks and connectivity of a stream of `num_sublayers` sublayers.

    Args:
        num_sublayers: L, at least one.
        config: Variant and blocks.

    Returns:
        The blocks; what each read position sees follows from them (arXiv 2603.15031, section 3.2).

    Raises:
        ScheduleError: The blocks asked for do not fit that number of sublayers.
    """
    if num_sublayers < 1:
        raise ScheduleError(f"a stream needs at least one sublayer; this one has {num_sublayers}.")
    return DepthSchedule(config.variant, _block_starts(num_sublayers, config), num_sublayers, window_of(config))


def window_of(config: AttnResConfig) -> Window | None:
    """The window that a config asks for."""
    return None if config.window is None else Window(config.window, config.window_keeps_root)


def _block_starts(count: int, config: AttnResConfig) -> tuple[int, ...]:
    if config.variant == "full":
        return tuple(range(count))
    if config.boundaries is not None:
        return (0, *_boundaries_in_range(count, config.boundaries))
    if config.num_blocks is not None:
        if config.num_blocks > count:
            raise ScheduleError(
                f"num_blocks={config.num_blocks} is more than the {count} sublayers of the stream: "
                f"choose num_blocks between 1 and {count}."
            )
        return even_starts(count, config.num_blocks)
    size = config.block_size if config.block_size is not None else -(-count // DEFAULT_BLOCKS)
    return tuple(range(0, count, size))


def even_starts(num_sublayers: int, num_blocks: int) -> tuple[int, ...]:
    """First sublayers of blocks whose sizes differ by at most one, the longer first."""
    size, longer = divmod(num_sublayers, num_blocks)
    return tuple(i * size + min(i, longer) for i in range(num_blocks))


def _boundaries_in_range(count: int, boundaries: Sequence[int]) -> tuple[int, ...]:
    if boundaries and boundaries[-1] >= count:
        raise ScheduleError(
            f"boundaries={tuple(boundaries)} go past the {count} sublayers of the stream: "
            f"each must be between 1 and {count - 1}."
        )
    return tuple(boundaries)
