"""What a weight file holds, checked before a byte of it is used: safetensors headers and torch .pth pickles.

safetensors is: 8 bytes little-endian header length, that many bytes of JSON (tensor name -> dtype, shape,
[begin, end) in the data), then the data, without holes. `read_header` proves all of it, so a cut download
or a scribbled header is one sentence that names the file, never a crash or a video of noise.

.pth is a zip of a pickle and of one record for each storage. Only `torch.load(weights_only=True)` ever sees
the pickle: it builds tensors and refuses to run code. The data stays in the file (mmap).
"""

import json
import math
import os
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.errors import WeightsError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

_MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
_MAX_NAME = 500  # characters of a tensor's name; those of the published files have at most 100
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**40  # so that a scribbled shape cannot overflow a stride
_CHUNK_BYTES = 64 * 2**20  # one read call; a call above 2 GiB is cut short by Linux
_ZIP_MAGIC = b"PK\x03\x04"  # by which torch.load too knows its format from the old one
_NESTED_KEYS = ("state_dict", "model", "module")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file stores it.

    name: the name in the file. shape: as stored (a per-tensor scale is `()` or `(1,)` here).
    offset: first byte in the file; None when a .pth stores the tensor in pieces (a transposed view).
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    offset: int | None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a .safetensors file, in the order of their data; reads the header only.

    Raises WeightsError for anything but a whole, well-formed file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise WeightsError(f"{path} is not a file; expected a .safetensors file there")
        size = status.st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise WeightsError(f"{path} is {size} bytes long: not a safetensors file; download it again")
            length = struct.unpack("<Q", start)[0]
            if length > _MAX_HEADER_BYTES or 8 + length > size:
                raise WeightsError(
                    f"{path} is {size} bytes long and its first 8 bytes announce a header of {length}: "
                    "truncated or not a safetensors file; download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    entries = _parse_json(path, text)
    entries.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.offset or 0, info.nbytes))
    end = 8 + length
    for info in tensors:
        if info.offset != end:
            raise WeightsError(
                f"{path}: tensor {info.name} begins at byte {info.offset}, expected {end} "
                "(a hole or an overlap): the header is corrupt; download the file again"
            )
        end += info.nbytes
    if end != size:
        what = "truncated" if size < end else "followed by foreign bytes"
        raise WeightsError(
            f"{path} is {size} bytes long, its header promises {end}: {what}; download it again"
        )
    return {info.name: info for info in tensors}


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise WeightsError(f"{path}: its header is not JSON ({error}); download the file again") from error
    if not isinstance(entries, dict):
        raise WeightsError(f"{path}: its header is not a JSON object; download the file again")
    return entries


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One header entry, with every field proven."""
    wrong = WeightsError(
        f"{path}: the header entry of tensor {name[:_MAX_NAME]!r} is malformed; download the file again"
    )
    if len(name) > _MAX_NAME:
        raise wrong
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise wrong
    if dtype not in DTYPES:
        raise WeightsError(
            f"{path}: tensor {name} has dtype {dtype[:40]}, which is not supported; "
            f"expected one of {', '.join(DTYPES)}"
        )
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise wrong
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise WeightsError(
            f"{path}: tensor {name} is {dtype} {shape}, that is {nbytes} bytes, and its header gives it "
            f"{end - begin}; download the file again"
        )
    return TensorInfo(name, path, DTYPES[dtype], tuple(shape), nbytes, data_start + begin)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)  # bool is not a size


def read_pickle(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Tensor]]:
    """Tensors of a .pth file: their descriptions and the memory-mapped tensors themselves.

    The dict may be flat or nested below `state_dict` or `model`. Raises WeightsError for a truncated file,
    for the old non-zip format, for compressed records, for a pickle that asks for anything but tensors (it is
    not executed), and for one whose tensors are not what the file holds.
    """
    try:
        records = _data_records(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever the unpickler raises on foreign bytes means the same to the user
        raise WeightsError(_pickle_fault(path, error)) from error
    if isinstance(loaded, Mapping):
        nested = [loaded[key] for key in _NESTED_KEYS if isinstance(loaded.get(key), Mapping)]
        loaded = nested[0] if nested else loaded
    if not isinstance(loaded, Mapping) or not all(_is_name(name) for name in loaded):
        raise WeightsError(
            f"{path} does not hold a dict of named tensors; expected a state dict saved with torch.save"
        )
    strangers = [name for name, tensor in loaded.items() if not isinstance(tensor, Tensor)]
    if strangers:
        raise WeightsError(
            f"{path}: entry {strangers[0]!r} is a {type(loaded[strangers[0]]).__name__}, expected a tensor; "
            "save the bare state dict"
        )
    tensors = dict(loaded)
    for name, tensor in tensors.items():
        _check_pickled(path, name, tensor)
    base = _mapping_base(path, tensors, records)
    infos = {name: _pickled_info(path, name, tensor, base) for name, tensor in tensors.items()}
    return infos, tensors


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_NAME


def _check_pickled(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse what no plain file of weights holds: a pickle can describe far more than it stores."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise WeightsError(
            f"{path}: tensor {name} is sparse, without data or of torch's quantized types; "
            "expected a plain one"
        )
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored or tensor.dim() > _MAX_DIMENSIONS:
        raise WeightsError(
            f"{path}: tensor {name} has shape {tuple(tensor.shape[:_MAX_DIMENSIONS])}, and {stored} bytes "
            "are stored for it; save it contiguous"
        )


def _pickle_fault(path: Path, error: Exception) -> str:
    text = str(error)
    if "mmap can only be used" in text:
        return (
            f"{path} is in torch's old non-zip format; load it and torch.save it once with torch 1.6 or newer"
        )
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r"GLOBAL (\S+)", text)
        what = f"asks for {asked.group(1)}" if asked else "cannot be read as tensors"
        return f"{path}: the pickle {what}; expected tensors only. Nothing was run; get another file"
    reason = text.splitlines()[0] if text else type(error).__name__
    return f"{path} is truncated, corrupt or not a torch file ({reason}); download it again"


def _pickled_info(path: Path, name: str, tensor: Tensor, base: int | None) -> TensorInfo:
    whole = base is not None and tensor.is_contiguous()
    offset = tensor.data_ptr() - base if whole and base is not None and tensor.numel() else None
    return TensorInfo(
        name, path, tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size(), offset
    )


def _mapping_base(path: Path, tensors: Mapping[str, Tensor], records: list[tuple[int, int]]) -> int | None:
    """Address of the file's first byte in this process, so that data_ptr - base is an offset in the file.

    torch does not tell it. It follows from the zip's table of contents: there is one distance at which every
    storage lies on a record of its size. None if several fit (all storages are alike and not all are used);
    WeightsError if none does: then the pickle's sizes are not those of the file.
    """
    stores = [tensor.untyped_storage() for tensor in tensors.values()]
    storages = sorted({(store.data_ptr(), store.nbytes()) for store in stores if store.nbytes()})
    if not storages:
        return None
    known = set(records)
    first, size = storages[0]
    bases = [first - offset for offset, nbytes in records if nbytes == size]
    fitting = [base for base in bases if all((at - base, nbytes) in known for at, nbytes in storages)]
    if not fitting:
        raise WeightsError(
            f"{path}: the sizes in its pickle are not those of its records: corrupt; download it again"
        )
    return fitting[0] if len(fitting) == 1 else None


def _data_records(path: Path) -> list[tuple[int, int]]:
    """(offset, size) of the non-empty `*/data/*` records of the zip, ascending; [] if it is no zip.

    Raises WeightsError for a compressed record: torch would map its bytes as they are, which is noise, and a
    few of them can stand for gigabytes.
    """
    records = []
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return []  # torch has a word for what it is
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise WeightsError(
                    f"{path}: its record {entry.filename[:_MAX_NAME]} is compressed; expected a file as "
                    "torch.save writes it: unpack and save it again"
                )
            parts = entry.filename.split("/")
            if len(parts) == 3 and parts[1] == "data" and entry.file_size:
                file.seek(entry.header_offset + 26)  # a local header: 30 bytes, a name and an extra field
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                records.append((entry.header_offset + 30 + name_length + extra_length, entry.file_size))
    return sorted(records)


def read_tensor(info: TensorInfo) -> Tensor:
    """The tensor's bytes from the file, by offset, into fresh CPU memory. Needs `info.offset`.

    Memory: the tensor itself; the page cache is the kernel's to drop.
    """
    tensor = torch.empty(info.shape, dtype=info.dtype)
    if info.nbytes:
        _read_into(info, tensor.reshape(-1).view(torch.uint8), 0)
    return tensor


def read_pieces(info: TensorInfo, most: int) -> Iterator[tuple[int, Tensor]]:
    """The tensor, flat, in pieces of at most `most` bytes: (first element, elements (n,)), by `info.offset`.

    Every piece lies in the same CPU memory: it is gone when the next one is asked for.
    """
    step = max(most // info.dtype.itemsize, 1)
    count = info.nbytes // info.dtype.itemsize
    space = torch.empty(min(step, count), dtype=info.dtype)
    for first in range(0, count, step):
        piece = space[: min(step, count - first)]
        _read_into(info, piece.view(torch.uint8), first * info.dtype.itemsize)
        yield first, piece


def _read_into(info: TensorInfo, space: Tensor, start: int) -> None:
    """Fill space (n,) uint8 with the tensor's bytes from its byte `start` on."""
    if info.offset is None:
        raise ValueError(f"{info.name} has no offset in {info.file}")
    target = memoryview(space.numpy().data)
    done = 0
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + start)
            while done < len(target):
                count = file.readinto(target[done : done + _CHUNK_BYTES])
                if not count:
                    raise WeightsError(
                        f"{info.file} ends inside tensor {info.name}: truncated; download it again"
                    )
                done += count
    except OSError as error:
        reason = error.strerror or error
        raise WeightsError(f"{info.file} cannot be read at {info.name}: {reason}") from error


def read_index(path: Path) -> dict[str, str]:
    """tensor name -> file name, from a `*.safetensors.index.json`; plain names, beside the index."""
    try:
        index = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error}); download it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no weight_map; expected the index of a set of safetensors files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and Path(file).name == file and len(os.fsencode(file)) <= 255
        if not plain or not file.endswith(SAFETENSORS_SUFFIX):
            raise WeightsError(
                f"{path}: tensor {name[:_MAX_NAME]} lies in {str(file)[:_MAX_NAME]!r}, expected the name of "
                "a .safetensors file beside the index"
            )
    return weight_map
