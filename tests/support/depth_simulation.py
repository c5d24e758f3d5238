"""Depth connectivity by simulation: one sublayer written at a time, in every grouping of a stream into blocks."""

from collections.abc import Iterator
from itertools import combinations, pairwise

from attnres_fx.config import AttnResConfig
from attnres_fx.passes.schedule import DepthSchedule, plan_schedule

Reads = list[list[str]]


def simulate(variant: str, sizes: list[int]) -> tuple[Reads, Reads]:
    """Sources of every read, and what lies on a cut after each number of sublayers, by the design's names.

    Keeps v_0, the completed blocks and the current partial sum (or the summary and this block's outputs)
    and writes one sublayer after another.
    """
    reads, cuts = [["v_0"]], [["v_0"]]
    last = len(sizes)
    past, own, written = ["v_0"], 0, 0
    for block, size in enumerate(sizes, start=1):
        for _ in range(size):
            written, own = written + 1, own + 1
            if variant == "full":
                past.append(f"v_{written}")
                reads.append(list(past))
            elif variant == "local":
                reads.append(past + [f"v_{i}" for i in range(written - own + 1, written + 1)])
            elif own == size:
                reads.append([*past, f"b_{block}"])
            else:
                reads.append([*past, f"b_{block}[:{own}]"])
            cuts.append(list(reads[-1]))
        own = 0
        if variant == "block":
            past.append(f"b_{block}")
        if variant == "local" and block < last:
            past = [f"c_{block + 1}"]
            cuts[-1] = list(past)
    return reads, cuts


def chunks(count: int, size: int) -> list[int]:
    return [size] * (count // size) + [count % size] * (count % size > 0)


def dealt(count: int, blocks: int) -> list[int]:
    """Sizes of blocks to which sublayers are dealt like cards."""
    return [len(range(i, count, blocks)) for i in range(blocks)]


def groupings(count: int) -> Iterator[tuple[dict, list[int]]]:
    """Options that give blocks to `count` sublayers, and the block sizes they mean."""
    yield {}, chunks(count, (count + 7) // 8)
    for n in range(1, count + 3):
        yield {"block_size": n}, chunks(count, n)
    for n in range(1, count + 1):
        yield {"num_blocks": n}, dealt(count, n)
    for cuts in range(count if count <= 6 else 3):
        for starts in combinations(range(1, count), cuts):
            edges = (0, *starts, count)
            yield {"boundaries": starts}, [b - a for a, b in pairwise(edges)]


def cases(*variants: str, longest: int = 14) -> Iterator[tuple[str, list[int], DepthSchedule]]:
    for variant in variants:
        for count in range(1, longest + 1):
            for options, sizes in [({}, [1] * count)] if variant == "full" else groupings(count):
                yield variant, sizes, plan_schedule(count, AttnResConfig(variant=variant, **options))


def names(sources) -> list[str]:
    return [str(s) for s in sources]


def sublayers(source) -> list[int]:
    return list(range(source.start, source.stop))
