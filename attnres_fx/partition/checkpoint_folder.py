"""A checkpoint folder of `torch.distributed.checkpoint` that is replaced as a whole, and read as plain data.

A save writes files under names of its own beside the old ones; `.metadata`, which names the files, is moved into place
when all of them are on the disk. Until then the folder holds the old checkpoint, and from then on the new one.
"""

import contextlib
import hashlib
import io
import math
import os
import pickle
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan

from attnres_fx.conversion.stored.whole_file import flush_folder, flush_to_disk
from attnres_fx.errors import AttnResError, SaveError

_METADATA = ".metadata"
_FILES = "__*.distcp"
_CHECKSUM = hashlib.sha256().digest_size
#: What a metadata file is made of, by module.
_PARTS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}


@contextlib.contextmanager
def in_words(path: Any, what: str) -> Iterator[None]:
    """Say of whatever is raised inside, here or on another rank, which checkpoint it was, as a SaveError."""
    try:
        yield
    except AttnResError:
        raise
    except (Exception, CheckpointException) as error:
        found = list(error.failures.values()) if isinstance(error, CheckpointException) else [(error, None)]
        why = next((e for e, _ in found if isinstance(e, SaveError)), found[0][0] if found else error)
        raise SaveError(f"the checkpoint {str(path)!r} {what} ({type(why).__name__}: {why}).") from error


class FolderWriter(FileSystemWriter):
    """Writes a checkpoint beside the one in the folder, and then puts it in its place.

    Args:
        path: The folder.
    """

    def __init__(self, path: Any) -> None:
        super().__init__(path, overwrite=True)
        self.fs = _Replacing()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The rank's own part, without a warning that a checkpoint is there: it stays until the new one is whole."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The parts of all ranks, in files that no other save writes to."""
        own = f"__{uuid.uuid4().hex[:16]}"
        prefixes = [plan.storage_data for plan in super().prepare_global_plan(plans)]
        return [
            replace(plan, storage_data=type(prefix)(own + prefix.prefix))
            for plan, prefix in zip(plans, prefixes, strict=True)
        ]

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Put the new checkpoint in the place of the old one, and remove that one's files."""
        super().finish(metadata, results)
        folder = Path(self.path)
        flush_folder(folder)
        used = {info.relative_path for info in metadata.storage_data.values()}
        for file in folder.glob(_FILES):
            if file.name not in used:
                file.unlink(missing_ok=True)


class _Replacing(FileSystem):
    """A file system where what takes the name of another file takes its place in one step."""

    def rm_file(self, path: Any) -> None:
        """Nothing: the writer removes the old metadata before it renames the new one, which replaces it."""

    def rename(self, path: Any, new_path: Any) -> None:
        """Metadata gets its checksum at the end, where whoever unpickles it does not look."""
        data = Path(path).read_bytes()
        Path(path).write_bytes(data + hashlib.sha256(data).digest())
        flush_to_disk(Path(path))
        Path(path).replace(new_path)


class FolderReader(FileSystemReader):
    """Reads a checkpoint whose files may hold anything: nothing of them is run, and what they claim is checked.

    Args:
        path: The folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder holds.

        Raises:
            SaveError: It is no metadata, or does not fit the files beside it.
            OSError: There is none.
        """
        data = (Path(self.path) / _METADATA).read_bytes()
        if hashlib.sha256(data[:-_CHECKSUM]).digest() != data[-_CHECKSUM:]:
            raise SaveError(f"the checksum at the end of {_METADATA} does not fit it")
        metadata = _PlainUnpickler(io.BytesIO(data)).load()
        if not isinstance(metadata, Metadata):
            raise SaveError(f"{_METADATA} holds a {type(metadata).__name__}")
        _check_places(Path(self.path), metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Read through every piece of a rank's part, before any rank puts one into its place.

        What a piece would take unpacked is looked at first, then its checksum. The pieces are read twice, so that a
        damaged checkpoint changes nothing on any rank.
        """
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            with (Path(self.path) / info.relative_path).open("rb") as file:
                _check_piece(_Window(file, info.offset, info.length), info.length, item)
        return super().prepare_local_plan(plan)


class PlainLoadPlanner(DefaultLoadPlanner):
    """Loads numbers, texts and tuples of them beside tensors, and nothing else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is no tensor."""
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if not known and name not in _PARTS.get(module, ()):
            raise SaveError(f"{_METADATA} names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


def _check_places(folder: Path, metadata: Metadata) -> None:
    """Raise SaveError where metadata claims more than the files beside it hold."""
    stored: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if not isinstance(index, MetadataIndex) or Path(name).name != name:
            raise SaveError(f"{_METADATA} names the file {name!r}, which is not in the folder")
        size = (folder / name).stat().st_size if (folder / name).is_file() else -1
        if size < 0:
            raise SaveError(f"the file {name!r} is missing")
        if min(info.offset, info.length) < 0 or info.offset + info.length > size:
            raise SaveError(f"{index.fqn!r} would end after the end of {name!r}: the file was cut off")
        stored[index.fqn] = stored.get(index.fqn, 0) + info.length
    for name, what in metadata.state_dict_metadata.items():
        if isinstance(what, TensorStorageMetadata):
            count = math.prod(what.size)
            pieces = sum(math.prod(chunk.sizes) for chunk in what.chunks)
            if min(what.size, default=0) < 0 or pieces != count:
                raise SaveError(f"the pieces of {name!r} are {pieces} numbers; {list(what.size)} has {count}")
            if count * what.properties.dtype.itemsize > stored.get(name, 0):
                raise SaveError(f"{name!r} {list(what.size)} is larger than what is stored of it")


def _check_piece(window: io.RawIOBase, length: int, item: ReadItem) -> None:
    """Raise SaveError where a stored piece would be larger unpacked than it is."""
    if item.type == LoadItemType.BYTE_IO and length > 2**20:
        raise SaveError(f"{item.storage_index.fqn!r}, an option, takes {length} bytes")
    with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > length:
            raise SaveError(f"{item.storage_index.fqn!r} is larger unpacked than it is stored")
        if archive.testzip() is not None:
            raise SaveError(f"the checksum of {item.storage_index.fqn!r} does not fit what is stored of it")


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        self._file.seek(self._start + self._at)
        found: bytes = self._file.read(left if size < 0 else min(size, left))
        self._at += len(found)
        return found
