"""The simulated step of a plan as a trace that Chrome (chrome://tracing) and Perfetto (ui.perfetto.dev) open.

Source: "Trace Event Format", Google, section "Complete events" and "Flow events".
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnres_fx.partition.simulate.timeline import Timeline

_KINDS = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}
_MICROSECONDS = 1e6
_STEP, _LINKS = 0, 1


def trace_events(timeline: Timeline) -> dict[str, Any]:
    """A step as trace events: a track for each rank, and one for each link between two ranks.

    Args:
        timeline: Of one step.

    Returns:
        JSON data; times in microseconds.
    """
    events = [_name("process_name", _STEP, 0, "ranks"), _name("process_name", _LINKS, 0, "links")]
    events += [_name("thread_name", _STEP, rank, f"rank {rank}") for rank in range(timeline.num_stages)]
    about = {
        "schedule": timeline.schedule,
        "ranks": timeline.num_stages,
        "stages a rank": timeline.virtual_stages,
        "microbatches": timeline.num_microbatches,
        "step seconds": timeline.step_seconds,
        "bubble": timeline.bubble,
    }
    return {
        "traceEvents": [*events, *_computations(timeline), *_messages(timeline)],
        "displayTimeUnit": "ms",
        "otherData": about,
    }


def write_trace(timeline: Timeline, path: str | Path) -> None:
    """Write the trace of a step. Raises OSError where the file cannot be written."""
    Path(path).write_text(json.dumps(trace_events(timeline)))


def _computations(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for rank, actions in enumerate(timeline.ranks):
        for timed in actions:
            action = timed.action
            args = {"stage": action.stage, "microbatch": action.microbatch}
            yield _complete(str(action), _KINDS[action.kind], _STEP, rank, timed.start, timed.end, args)


def _messages(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Messages on the track of their link, with an arrow from what sends them to what waits for them."""
    links = sorted({(h.source_rank, h.target_rank) for h in timeline.hops})
    track = {link: i for i, link in enumerate(links)}
    for (source, target), i in track.items():
        yield _name("thread_name", _LINKS, i, f"rank {source} to {target}")
    timed = {t.action: t for rank in timeline.ranks for t in rank}
    for number, hop in enumerate(timeline.hops):
        forward = hop.action.kind == "F"
        what = "output" if forward else "gradient"
        args = {"stage": hop.action.stage, "microbatch": hop.action.microbatch}
        link = track[hop.source_rank, hop.target_rank]
        yield _complete(f"{what} of {hop.action}", what, _LINKS, link, hop.start, hop.end, args)
        waits = hop.action._replace(stage=hop.action.stage + (1 if forward else -1))
        sender, receiver = timed[hop.action], timed[waits]
        arrow = {"name": what, "cat": "message", "id": number}
        middle = (sender.start + sender.end) / 2  # an arrow begins inside of what it belongs to
        yield {**arrow, "ph": "s", "pid": _STEP, "tid": hop.source_rank, "ts": middle * _MICROSECONDS}
        yield {**arrow, "ph": "t", "pid": _LINKS, "tid": link, "ts": hop.start * _MICROSECONDS}
        begin = receiver.start * _MICROSECONDS
        yield {**arrow, "ph": "f", "bp": "e", "pid": _STEP, "tid": hop.target_rank, "ts": begin}


def _complete(
    name: str, kind: str, process: int, track: int, start: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    begin, length = start * _MICROSECONDS, (end - start) * _MICROSECONDS
    about = {"name": name, "cat": kind, "ph": "X", "pid": process, "tid": track}
    return {**about, "ts": begin, "dur": length, "args": args}


def _name(what: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}
