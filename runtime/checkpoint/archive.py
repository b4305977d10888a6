"""A .pth written piece by piece: what torch.save makes of a dict of tensors, without the tensors in memory.

The format is a zip, uncompressed: `archive/data.pkl`, a pickle in which each storage is a reference, and one
record `archive/data/N` for each storage. The pickle is made by torch's own rules from tensors that are never
filled, so their memory is never touched; the records are then written as their bytes come. Records begin at
multiples of 64 bytes, as torch's do, so that a mapped file has aligned tensors. Checksums are right.
"""

import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint.write import replacing

ROOT = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER = 30  # bytes of a zip's header of a record, before its name and its extra fields
_ZIP64_EXTRA = 20  # an extra field of sizes above 4 GiB
_BIG = 1 << 30  # records from here on get it: Python's zipfile decides so itself only near 2 GiB
_PADDING = b"FB"  # the extra field that torch pads with

Pieces = Callable[[str, Tensor], Iterable[Tensor]]
"""(name, tensor on meta) -> its elements in order, as flat contiguous tensors of its dtype."""


def write_archive(path: Path, plan: Mapping[str, Tensor], pieces: Pieces) -> int:
    """Write `path`, a .pth of the flat dict `plan` (contiguous tensors on meta); returns its size in bytes.

    Memory: a piece. Raises OutputError when the file cannot be written, ValueError for pieces that do not fit
    the plan.
    """
    with replacing(path) as part, part.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            small = {"data.pkl": pickled(plan), "byteorder": sys.byteorder.encode(), "version": b"3\n"}
            for name in ("data.pkl", "byteorder"):
                _record(file, archive, name, len(small[name]), [small[name]])
            for key, (name, like) in enumerate(plan.items()):
                _record(file, archive, f"data/{key}", like.nbytes, _bytes(name, like, pieces(name, like)))
            _record(file, archive, "version", len(small["version"]), [small["version"]])
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def pickled(plan: Mapping[str, Tensor]) -> bytes:
    """The pickle of a flat dict of tensors as torch.save writes it, storages numbered in the dict's order."""
    out = io.BytesIO()
    # Allocated and never written: pages that nobody touches are no memory.
    blank = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in plan.items()}
    pickler = _Pickler(out, protocol=2)
    pickler.dump(blank)
    return out.getvalue()


def holds(path: Path, plan: Mapping[str, Tensor]) -> bool:
    """Whether `path` is a whole .pth with a record of the right size for each tensor of the plan."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False
    wanted = {f"{ROOT}/data/{key}": like.nbytes for key, like in enumerate(plan.values())}
    records = {name: size for name, size in sizes.items() if name.startswith(f"{ROOT}/data/")}
    return records == wanted and f"{ROOT}/data.pkl" in sizes


class _Pickler(pickle.Pickler):
    """Writes a storage as torch's unpickler wants it: (kind, class, key, device, number of elements)."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.keys: dict[int, str] = {}
        self.kept: list[Any] = []  # an id means nothing once its object is gone

    def persistent_id(self, obj: Any) -> Any:
        """The reference to a storage; None for whatever is pickled as it is."""
        if isinstance(obj, torch.storage.TypedStorage):
            # Formats that torch has long known have classes of their own, of which only the name is left.
            kind = getattr(torch, obj._pickle_storage_type())
            storage, count = obj._untyped_storage, obj._size()
        elif isinstance(obj, torch.UntypedStorage):  # fp8
            storage, kind, count = obj, torch.UntypedStorage, obj.nbytes()
        else:
            return None
        self.kept.append(storage)
        key = self.keys.setdefault(storage._cdata, str(len(self.keys)))
        return ("storage", kind, key, "cpu", count)


def _bytes(name: str, like: Tensor, pieces: Iterable[Tensor]) -> Iterator[memoryview]:
    """The pieces of a tensor as bytes; ValueError unless they are of its dtype and length."""
    written = 0
    for piece in pieces:
        if piece.dtype != like.dtype:
            raise ValueError(f"{name} is {like.dtype}, and a piece of it is {piece.dtype}")
        written += piece.nbytes
        yield memoryview(piece.view(torch.uint8).numpy().data)
    if written != like.nbytes:
        raise ValueError(f"{name} has {like.nbytes} bytes, and its pieces {written}")


def _record(
    file: io.BufferedWriter,
    archive: zipfile.ZipFile,
    name: str,
    size: int,
    data: Iterable[bytes | memoryview],
) -> None:
    """One uncompressed record, its data at a multiple of 64 bytes."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}")  # of a fixed date: the same content gives the same file
    info.file_size = size
    big = size >= _BIG
    before = file.tell() + _LOCAL_HEADER + len(info.filename.encode()) + (_ZIP64_EXTRA if big else 0)
    padding = -(before + 4) % _ALIGNMENT
    info.extra = struct.pack("<2sH", _PADDING, padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=big) as record:
        for part in data:
            record.write(part)
