"""The tensors of a model as they stand in a file: which share what, where they are, and a checksum of each."""

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnres_fx.conversion.stored.arguments import ArgumentReader, DeviceMap
from attnres_fx.errors import SaveError

_PLAIN = {f"float{n}" for n in (16, 32, 64)} | {f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)}
_PLAIN |= {"bfloat16", "bool"}
_KINDS = ("parameter", "buffer", "constant", "attribute", "loose")


class TensorTable:
    """The tensors that a file holds.

    Attributes:
        entries: One for each tensor's name: what it is, and where it is stored.
        data: What is stored, by key: tensors on the CPU.
    """

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.data: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []
        self._sharing: dict[int, list[Tensor]] = {}
        self._whole: dict[int, str] = {}

    def add_tree(self, root: nn.Module) -> None:
        """Every parameter and buffer of a module tree. Raises SaveError for one that a file cannot hold."""
        named: list[tuple[str, str, Tensor]] = []
        for name, parameter in root.named_parameters(remove_duplicate=False):
            named.append((name, "parameter", parameter))
        for prefix, module in root.named_modules(remove_duplicate=False):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    kind = "constant" if name in module._non_persistent_buffers_set else "buffer"
                    named.append((f"{prefix}.{name}" if prefix else name, kind, buffer))
        for name, _, tensor in named:
            _refuse_special(name, tensor)
            if not tensor.is_meta:
                sharing = self._sharing.setdefault(tensor.untyped_storage().data_ptr(), [])
                if all(t is not tensor for t in sharing):
                    sharing.append(tensor)
        for name, kind, tensor in named:
            self.add(name, kind, tensor)

    def add(self, name: str, kind: str, tensor: Tensor) -> None:
        """One more tensor."""
        _refuse_special(name, tensor)
        entry: dict[str, Any] = {"kind": kind}
        self.entries[name] = entry
        if id(tensor) in self._names:
            entry["same"] = self._names[id(tensor)]
            return
        self._names[id(tensor)] = name
        self._kept.append(tensor)
        entry |= {"dtype": _dtype(tensor), "shape": list(tensor.shape), "device": str(tensor.device)}
        entry["grad"] = tensor.requires_grad
        if not tensor.is_meta:
            self._store(name, entry, tensor.detach())

    def name_of(self, tensor: Tensor) -> str:
        """The name of a tensor, which is added where it is none of the tree's."""
        if id(tensor) not in self._names:
            self.add(f"loose.{len(self.entries)}", "loose", tensor)
        return self._names[id(tensor)]

    def checksums(self) -> dict[str, str]:
        """By key, the checksum of what is stored."""
        return {key: checksum(tensor) for key, tensor in self.data.items()}

    def _store(self, name: str, entry: dict[str, Any], tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        shared = len(self._sharing.get(storage.data_ptr(), ())) > 1 and storage.nbytes() > 0
        if not shared and entry["dtype"] in _PLAIN:
            entry["stored"] = name
            stored = tensor.resolve_conj().resolve_neg().cpu().contiguous()
            seen = storage.data_ptr() in self._whole  # by an attribute that is no buffer
            self._whole[storage.data_ptr()] = name
            self.data[name] = stored.clone() if seen else stored
            return
        if not shared:
            tensor = tensor.resolve_conj().resolve_neg().cpu().contiguous().clone()
            storage = tensor.untyped_storage()
        key = self._whole.setdefault(storage.data_ptr(), name) if shared else name
        entry |= {"stored": key, "offset": tensor.storage_offset(), "strides": list(tensor.stride())}
        if key == name:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
            self.data[key] = flat.cpu()


def plain_tensor(name: str, tensor: Tensor) -> Tensor:
    """A tensor as it is stored alone. Raises SaveError for one that a file cannot hold."""
    _refuse_special(name, tensor)
    if tensor.is_meta:
        raise SaveError(f"{name} is on the meta device and has no values to save")
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def _refuse_special(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise SaveError(
            f"{name} is a {type(tensor).__name__}, which a file cannot hold: save the state of the plain tensors it "
            f"stands for (a DTensor has full_tensor())"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise SaveError(f"{name} is {tensor.layout}, quantized or both, which a file cannot hold")


def _is_inside(count: int, offset: Any, shape: list[int], strides: Any) -> bool:
    """Whether a view stays within so many elements."""
    numbers = [offset, *strides] if isinstance(strides, list) and len(strides) == len(shape) else [None]
    if any(type(n) is not int or n < 0 for n in numbers):
        return False
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return 0 in shape or bool(last < count)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes; it is contiguous and on the CPU."""
    count = tensor.numel() * tensor.element_size()
    held = (ctypes.c_char * count).from_address(tensor.data_ptr()) if count else b""
    return hashlib.sha256(memoryview(held)).hexdigest()


class TensorReader:
    """Reads the tensors of a file.

    Args:
        entries: What `TensorTable.entries` was.
        checksums: By key.
        names: The keys under which something is stored.
        stored: Returns what is stored under a key, on the CPU.
        device: Where what the file has on a device is now.
    """

    def __init__(
        self, entries: Any, checksums: Any, names: set[str], stored: Callable[[str], Tensor], device: DeviceMap
    ) -> None:
        if not isinstance(entries, dict) or not isinstance(checksums, dict):
            raise SaveError("the list of tensors is missing")
        if different := sorted(names ^ set(checksums)):
            raise SaveError(f"the tensor {different[0]!r:.80} is stored without a checksum, or the other way round")
        self.entries, self.checksums, self.stored = entries, checksums, stored
        self.plain = ArgumentReader({}, device)
        self.whole: dict[tuple[str, torch.device], Tensor] = {}

    def read(self) -> dict[str, Tensor]:
        """Every tensor by name; those that were one tensor are one.

        Raises:
            SaveError: An entry, a size or a checksum does not fit; it names the first.
        """
        tensors: dict[str, Tensor] = {}
        for name, entry in self.entries.items():
            try:
                tensors[name] = self._one(entry, tensors)
            except Exception as error:
                raise SaveError(f"the tensor {name!r:.80}: {error}") from error
        unused = set(self.checksums) - {e.get("stored") for e in self.entries.values()}
        if unused:
            raise SaveError(f"the tensor {min(unused)!r:.80} belongs to nothing")
        return tensors

    def _one(self, entry: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        match entry:
            case {"kind": str() as kind, "same": str() as same, **rest} if kind in _KINDS and not rest:
                if same not in tensors:
                    raise SaveError(f"it is said to be {same!r:.60}, which does not come before it")
                return tensors[same]
            case {"kind": kind, "dtype": dtype, "shape": list() as shape, "device": device, "grad": bool() as grad}:
                made = self._made(entry, self.plain.read({"dtype": dtype}), shape, self.plain.read({"device": device}))
                if kind in _KINDS:
                    return nn.Parameter(made, grad) if kind == "parameter" else made.requires_grad_(grad)
        raise SaveError("its entry is incomplete")

    def _made(self, entry: dict[str, Any], dtype: torch.dtype, shape: list[Any], device: torch.device) -> Tensor:
        if any(type(s) is not int or s < 0 for s in shape):
            raise SaveError(f"{shape!r:.60} is no shape")
        if "stored" not in entry:
            return torch.empty(shape, dtype=dtype, device="meta")
        key = entry["stored"]
        if "strides" not in entry:
            return self._checked(key, dtype, shape).to(device, copy=True)
        if (key, device) not in self.whole:
            self.whole[key, device] = self._checked(key, torch.uint8, None).to(device, copy=True)
        storage = self.whole[key, device].untyped_storage()
        offset: Any = entry.get("offset")
        strides: Any = entry["strides"]
        empty = torch.empty(0, dtype=dtype, device=device)
        if not _is_inside(storage.nbytes() // empty.element_size(), offset, shape, strides):
            raise SaveError(f"offset {offset!r:.20} and strides {strides!r:.60} lead out of what is stored")
        return empty.set_(storage, offset, shape, strides)  # type: ignore[call-overload, no-any-return]

    def _checked(self, key: Any, dtype: torch.dtype, shape: list[int] | None) -> Tensor:
        if not isinstance(key, str) or key not in self.checksums:
            raise SaveError(f"what is stored as {key!r:.60} has no checksum")
        stored = self.stored(key)
        if stored.dtype != dtype or (shape is not None and list(stored.shape) != shape):
            raise SaveError(
                f"it has dtype {dtype} and shape {shape}, and {stored.dtype} {list(stored.shape)} is stored"
            )
        if checksum(stored.contiguous()) != self.checksums[key]:
            raise SaveError("its checksum does not fit: the file is damaged")
        return stored
