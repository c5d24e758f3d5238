"""Names of streams and of their reads, from module paths and places: the same whatever tracer made the graph."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from attnres_fx.passes.streams.stream import Read, Stream


def name_streams(streams: Sequence[Stream], branches: Sequence[Sequence[str]], order: Iterable[int]) -> list[Stream]:
    """Name each stream after the module path its sublayers and reads share, and its reads; number what repeats.

    Args:
        streams: Without names; their reads are named after a module, or not at all.
        branches: The paths of the modules that compute the sublayers of each.
        order: In which names are given, by index: of several streams of one path the first has it without a number.

    Returns:
        The streams with names, in the order they came in.
    """
    seen: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    named = {}
    for index in order:
        stream = streams[index]
        paths = [p for p in (*branches[index], *(r.module for r in stream.depth_reads)) if p]
        name = _numbered(_common_path(paths) or "stream", seen)
        reads = tuple(_named(read, name, taken) for read in stream.reads)
        named[index] = replace(stream, name=name, reads=reads)
    return [named[index] for index in range(len(streams))]


def _named(read: Read, stream: str, taken: Counter[str]) -> Read:
    """A read under a name of its own. Where no module consumes it that is its place in the stream.

    The read that sees only the root has no parameters and takes no number.
    """
    name = read.name or f"{stream}.read_{read.position}"
    return replace(read, name=name if read.sees_only_root else _numbered(name, taken))


def _numbered(name: str, taken: Counter[str]) -> str:
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"


def _common_path(paths: Sequence[str]) -> str:
    split = [p.split(".") for p in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
