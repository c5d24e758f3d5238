"""Timing, byte counts and results files that the GPU benchmarks share."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
#: Larger than the L2 of any GPU so far; reading it evicts everything else.
FLUSH_BYTES = 256 << 20
#: The copy whose bandwidth every figure is a share of: this many bytes read and as many written.
COPY_BYTES = 1 << 30
#: Calls in one CUDA graph where one call is too short for events.
CALLS_PER_GRAPH = 64

Run = Callable[[], object]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def environment(device: torch.device, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a figure depends on besides the code: device, versions, date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": name,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "versions": {p: version_of(p) for p in ("attnres-fx", "triton", *packages)},
    }


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Written beside and moved into place, so that a run cut short leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def default_output(benchmark: str, device: torch.device, smoke: bool) -> Path:
    where = torch.cuda.get_device_name(device).replace(" ", "-").lower() if device.type == "cuda" else device.type
    return RESULTS / f"{benchmark}-{where}{'-smoke' if smoke else ''}.json"


def forward_bytes(sources: int, tokens: int, width: int, itemsize: int) -> int:
    """S sources read and one output written."""
    return (sources + 1) * tokens * width * itemsize


def backward_bytes(sources: int, tokens: int, width: int, itemsize: int) -> int:
    """S sources and the output's gradient read, S gradients written."""
    return (2 * sources + 1) * tokens * width * itemsize


def statistics_bytes(sources: int, tokens: int) -> int:
    """Two float32 numbers a row and source: written by the forward, read by the backward."""
    return 2 * sources * tokens * 4


def counted_bytes(direction: str, sources: int, tokens: int, width: int, itemsize: int) -> int:
    forward = forward_bytes(sources, tokens, width, itemsize) + statistics_bytes(sources, tokens)
    backward = backward_bytes(sources, tokens, width, itemsize) + statistics_bytes(sources, tokens)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


class Clock:
    """Seconds that a call takes on a device, from a cold L2 on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)

    def seconds(self, run: Run, before: Run | None = None) -> float:
        """`before` runs first and is not counted."""
        if before is not None:
            before()
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        # Read, not written: dirty lines would be written back on the time of the call that follows.
        self._flush.sum()
        # The host enqueues the whole call while the device waits here, so that launch overhead is not counted.
        torch.cuda._sleep(2_000_000)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        run()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3

    def graph_seconds(self, graph: "torch.cuda.CUDAGraph") -> float:
        """Seconds of one of the calls in a graph from `captured`; its inputs may be in L2, as they are in decoding."""
        return self.seconds(graph.replay) / CALLS_PER_GRAPH


def captured(run: Run) -> "torch.cuda.CUDAGraph":
    """A CUDA graph of CALLS_PER_GRAPH calls, warmed up on the stream it is captured on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS_PER_GRAPH):
            run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def copy_of(device: torch.device, nbytes: int = COPY_BYTES) -> Run:
    """A large `copy_`, to be timed beside the rest; it moves 2 * nbytes."""
    source = torch.empty(nbytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over the largest absolute value wanted; infinite where `found` is not finite."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    worst = (found.to(wanted.dtype) - wanted).abs().max().item() if wanted.numel() else 0.0
    return worst / scale if scale else worst


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and the spread around it, in microseconds."""
    ordered = sorted(1e6 * t for t in times)
    tenth = len(ordered) // 10
    return {
        "microseconds": statistics.median(ordered),
        "p10_microseconds": ordered[tenth],
        "p90_microseconds": ordered[-1 - tenth],
    }


def reason_of(error: BaseException) -> str:
    """One line of an exception for a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]
