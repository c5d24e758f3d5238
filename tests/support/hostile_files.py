"""What a file may be replaced by: damage, other formats that run code, lies about sizes; and what reading it did."""

import contextlib
import gzip
import io
import json
import pickle
import random
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: What the Python objects of a small program take, whatever the sizes that a file declares.
ALLOWANCE = 4 * 2**20
HUGE = [10**9, 2**40, 2**63 - 1, 2**63, 10**30]
PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "a/../../b",
    "",
    ".",
    "..",
    "__class__.__init__",
    "\x00",
    "x" * 5000,
]
Mutation = tuple[str, bytes]


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def damaged(whole: bytes, draw: random.Random) -> Iterator[Mutation]:
    """170 kinds of damage: bits, ends, runs of zeros, parts that changed places."""
    for _ in range(90):
        data, at = bytearray(whole), draw.randrange(len(whole) if draw.random() < 0.4 else min(len(whole), 4000))
        data[at] ^= 1 << draw.randrange(8)
        yield f"bit at {at}", bytes(data)
    for at in (0, 1, 7, 8, 9, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(34))):
        yield f"cut at {at}", whole[:at]
    for _ in range(20):
        at, count = draw.randrange(len(whole)), draw.randrange(1, 2000)
        yield f"{count} zeros at {at}", whole[:at] + bytes(count) + whole[at + count :]
    for _ in range(20):
        one, two = sorted((draw.randrange(len(whole)), draw.randrange(len(whole))))
        yield f"turned at {one} and {two}", whole[:one] + whole[two:] + whole[one:two]


def foreign(mark: Path) -> Iterator[Mutation]:
    """20 files of other kinds, most of which run code or grow when the wrong reader takes them."""
    for protocol in range(6):
        yield f"pickle {protocol}", pickle.dumps(Runs(mark), protocol)
    for new in (True, False):
        file = io.BytesIO()
        torch.save({"about": Runs(mark)}, file, _use_new_zipfile_serialization=new)
        yield f"torch.save, zip: {new}", file.getvalue()
    zeros = bytes(12 * 2**20)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", zeros)
        archive.writestr("../../evil", b"x")
    yield "zip bomb", packed.getvalue()
    yield "gzip bomb", gzip.compress(zeros, 1)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz", compresslevel=1) as archive_:
        member = tarfile.TarInfo("../../evil")
        member.size = len(zeros)
        archive_.addfile(member, io.BytesIO(zeros))
    yield "tar bomb", tar.getvalue()
    source = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    yield "source", source.encode()
    yield "yaml", f"!!python/object/apply:os.system ['touch {mark}']".encode()
    yield "npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'shape': (1,)}".ljust(128) + pickle.dumps(Runs(mark))
    yield "not utf-8", b'{"format": "\xff\xfe\x00"}'
    yield "deep lists", b"[" * 200_000
    yield "deep tables", b'{"a":' * 100_000
    yield "long number", b'{"format": ' + b"9" * 100_000 + b"}"
    yield "surrogates", b'{"format": "\\ud800", "checksum": "\\udfff"}'
    yield "nothing but zeros", bytes(10_000)


def forged_containers(whole: bytes) -> Iterator[Mutation]:
    """About 80 headers that lie, on the tensors of a right safetensors file."""
    size = int.from_bytes(whole[:8], "little")
    rest = whole[8 + size :]
    for length in (0, 1, size - 1, size + 1, len(whole), 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"header of {length}", length.to_bytes(8, "little") + whole[8:]
    header = json.loads(whole[8 : 8 + size])
    first = next(n for n in header if n != "__metadata__")

    def with_header(**changes: Any) -> bytes:
        text = json.dumps({**header, **changes}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + rest

    entry = header[first]
    for huge in HUGE:
        yield f"shape of {huge}", with_header(**{first: {**entry, "shape": [huge]}})
        yield f"ends at {huge}", with_header(**{first: {**entry, "data_offsets": [0, huge]}})
        yield f"both {huge}", with_header(**{first: {**entry, "shape": [huge, huge], "data_offsets": [0, 4 * huge**2]}})
        yield f"one more of {huge}", with_header(more={"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]})
    for value in (-1, None, "x", [], {}, 1.5, True, 10**400):
        for key in ("dtype", "shape", "data_offsets"):
            yield f"{key} = {value!r:.20}", with_header(**{first: {**entry, key: value}})
        yield f"metadata = {value!r:.20}", with_header(__metadata__=value)
        yield f"entry = {value!r:.20}", with_header(**{first: value})
    for path in PATHS:
        yield f"tensor {path!r:.30}", with_header(**{path: entry})
        text = json.dumps(header).replace(json.dumps(first), json.dumps(path)).encode()
        yield f"renamed {path!r:.30}", len(text).to_bytes(8, "little") + text + rest


# --- what reading a file did -------------------------------------------------------------------------

_WATCHED = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
_seen: list[str] | None = None


def _hook(event: str, args: Any) -> None:
    if _seen is not None and event.startswith(_WATCHED):
        _seen.append(f"{event} {args!r:.100}")


class _Made(TorchDispatchMode):
    """Adds up the bytes of all storages that torch operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in pytree.tree_leaves(result):
            if type(tensor) is Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.bytes += storage.nbytes() * (storage._cdata not in given)
        return result


@contextlib.contextmanager
def harmless(size: int, what: str) -> Iterator[None]:
    """Raise AssertionError where reading a file of so many bytes runs, imports or starts something, or takes memory.

    Memory is the most that Python held at once (tracemalloc, in which the copies that safetensors makes count), and
    all that torch operations made together, freed or not.
    """
    global _seen
    if _hook not in _installed:
        sys.addaudithook(_hook)
        _installed.append(_hook)
    modules, made = set(sys.modules), _Made()
    _seen = []
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with made:
            yield
    finally:
        seen, _seen = _seen, None
        peak = tracemalloc.get_traced_memory()[1] - before
        if started:
            tracemalloc.stop()
    assert not seen, (what, seen)
    assert set(sys.modules) == modules, (what, set(sys.modules) - modules)
    assert peak + made.bytes <= 2 * size + ALLOWANCE, (what, size, peak, made.bytes)


_installed: list[Any] = []
_ = subprocess  # imported before anything is watched
