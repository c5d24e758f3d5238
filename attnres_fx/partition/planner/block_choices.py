"""Which blocks a planner may choose.

Later boundaries make every read of the `block` variant cheaper, so a planner that only counted seconds would put all
of them at the end, and the model would suffer. Sizes therefore stay near even: all within `slack` of ceil(L / B), with
slack = max(1, L // (4 B)); the last block may be shorter.
"""

from collections.abc import Iterator, Mapping
from functools import cache


def block_sizes(count: int, blocks: int) -> tuple[int, int]:
    """The smallest and largest size of a block (the last one may be smaller) for so many sublayers and blocks."""
    size, slack = -(-count // blocks), max(1, count // (4 * blocks))
    return max(1, size - slack), size + slack


def all_blocks(count: int, blocks: int) -> Iterator[tuple[int, ...]]:
    """Starts of every allowed choice."""
    low, high = block_sizes(count, blocks)

    def longer(starts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        left = blocks - len(starts)
        if left == 0:
            if count - starts[-1] <= high:
                yield starts
            return
        for size in range(low, high + 1):
            start = starts[-1] + size
            # The rest must be able to fill what is left, and to fit there.
            if start + (left - 1) * low < count <= start + left * high:
                yield from longer((*starts, start))

    yield from longer((0,))


def count_blocks(count: int, blocks: int, enough: int) -> int:
    """How many choices there are, counted up to about `enough`."""
    low, high = block_sizes(count, blocks)

    @cache
    def choices(left: int, length: int) -> int:
        if left == 1:
            return int(1 <= length <= high)
        found = 0
        for size in range(low, min(high, length - 1) + 1):
            found += choices(left - 1, length - size)
            if found > enough:
                break
        return found

    return choices(blocks, count)


def latest_blocks(
    count: int, blocks: int, at_most: Mapping[int, int], at_least: Mapping[int, int]
) -> tuple[int, ...] | None:
    """The allowed starts of which each is as late as it can be; None where none are allowed.

    at_most, at_least: bounds on the starts of some blocks, by index. (Bounds on differences have a largest solution.)
    """
    low, high = block_sizes(count, blocks)
    starts = [0, *(min(at_most.get(k, count), count - 1 - (blocks - 1 - k) * low) for k in range(1, blocks))]
    changed = True
    while changed:
        before = list(starts)
        for k in range(1, blocks):
            starts[k] = min(starts[k], starts[k - 1] + high)
        for k in reversed(range(1, blocks - 1)):
            starts[k] = min(starts[k], starts[k + 1] - low)
        changed = starts != before
    first = blocks == 1 or starts[1] >= low
    fits = first and count - starts[-1] <= high and all(starts[k] >= least for k, least in at_least.items())
    return tuple(starts) if fits else None
