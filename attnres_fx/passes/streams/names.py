"""Names of streams and of their reads."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from attnres_fx.passes.streams.stream import Read, Stream


def number_reads(reads: list[Read]) -> tuple[Read, ...]:
    """Number the repeats of a name; the read that sees only the root has no parameters and no number."""
    seen: Counter[str] = Counter()
    result = []
    for read in reads:
        if not read.sees_only_root:
            seen[read.name] += 1
            if seen[read.name] > 1:
                read = replace(read, name=f"{read.name}#{seen[read.name]}")
        result.append(read)
    return tuple(result)


def name_streams(streams: list[Stream]) -> list[Stream]:
    """Name each stream after the module path its terms and reads share; keep read names apart too."""
    seen: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    named = []
    for stream in streams:
        paths = [p for p in (*(t.module for t in stream.terms), *(r.module for r in stream.depth_reads)) if p]
        base = _common_path(paths) or "stream"
        seen[base] += 1
        reads = []
        for read in stream.reads:
            if not read.sees_only_root:
                plain = read.name.split("#")[0]
                taken[plain] += 1
                read = replace(read, name=plain if taken[plain] == 1 else f"{plain}#{taken[plain]}")
            reads.append(read)
        named.append(replace(stream, name=base if seen[base] == 1 else f"{base}#{seen[base]}", reads=tuple(reads)))
    return named


def _common_path(paths: Sequence[str]) -> str:
    split = [p.split(".") for p in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
