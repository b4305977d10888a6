"""Writing of safetensors, .pth and JSON files, whole or not at all: beside the name, then renamed."""

import json
import os
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.checkpoint.files import DTYPES, TensorInfo, read_header
from runtime.errors import OutputError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path,
    plan: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    on_data: Callable[[memoryview], object] | None = None,
) -> int:
    """Write `path` and return its size in bytes; memory beyond what `tensors` yields: none.

    plan: name -> a tensor of the right dtype and shape, on meta when `tensors` yields the data (in the plan's
    order). on_data(bytes) sees all that is written, in order, as a digest wants it. Raises OutputError when
    the file cannot be written.
    """
    head = _head(plan)
    planned = iter(plan.items())
    with replacing(path) as part, part.open("wb") as file:

        def put(data: memoryview) -> None:
            file.write(data)
            if on_data is not None:
                on_data(data)

        put(memoryview(head))
        for name, tensor in plan.items() if tensors is None else tensors:
            expected_name, like = next(planned)
            if (name, tensor.shape, tensor.dtype) != (expected_name, like.shape, like.dtype):
                raise ValueError(
                    f"{name} {tensor.dtype} {tuple(tensor.shape)} differs from the plan's {expected_name}"
                )
            put(_bytes(tensor))
        if next(planned, None) is not None:
            raise ValueError("fewer tensors than planned")
        file.flush()
        os.fsync(file.fileno())
    return safetensors_size(plan)


def safetensors_size(plan: Mapping[str, Tensor]) -> int:
    """Bytes that `write_safetensors` will write for this plan."""
    return len(_head(plan)) + sum(tensor.numel() * tensor.element_size() for tensor in plan.values())


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """torch.save of the flat dict, as the published .pth files are; returns its size in bytes."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        storage = whole.untyped_storage()
        # a view would drag its whole storage into the file, so each tensor gets its own
        if storage.nbytes() != whole.nbytes or storage.data_ptr() in taken:
            whole = whole.clone()
        taken.add(whole.untyped_storage().data_ptr())
        plain[name] = whole
    with replacing(path) as part:
        try:
            torch.save(plain, part)
        except RuntimeError as error:  # how torch's writer says that the disk is full
            raise _unwritable(path, str(error).splitlines()[0]) from error
        with part.open("rb") as file:
            os.fsync(file.fileno())
    return path.stat().st_size


def scratch_name(path: Path) -> Path:
    """Where `stream_pickle` puts the data of `path` before they go into the zip; hidden, beside it."""
    return path.with_name(f".{path.name}.scratch")


def stream_pickle(path: Path, plan: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> int:
    """`write_pickle` of tensors that come one at a time, in the plan's order; returns the file's size.

    torch.save wants all of them at once, so they go to a file beside `path` first and from there, mapped,
    into the zip. Memory: one tensor, and pages that the kernel may drop. Disk: twice the file for a while.
    """
    scratch = scratch_name(path)
    try:
        write_safetensors(scratch, plan, tensors)
        return write_pickle(path, {name: _map(info) for name, info in read_header(scratch).items()})
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON with a last newline."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _head(plan: Mapping[str, Tensor]) -> bytes:
    """Length and JSON of a safetensors header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in plan.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins aligned
    return struct.pack("<Q", len(text)) + text


def _map(info: TensorInfo) -> Tensor:
    """The tensor of a safetensors file as pages of that file, with a storage of its own."""
    if not info.nbytes or info.offset is None:
        return torch.empty(info.shape, dtype=info.dtype)
    pages = np.memmap(info.file, dtype=np.uint8, mode="r", offset=info.offset, shape=(info.nbytes,))
    with warnings.catch_warnings():  # torch warns of arrays that may not be written to; nobody writes here
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(pages).view(info.dtype).reshape(info.shape)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def part_name(path: Path) -> Path:
    """What `path` is called while it is being written; hidden, beside it."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` on success and is removed on failure.

    An OSError inside becomes an OutputError that names `path`.
    """
    part = part_name(path)
    with telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """OSErrors of what is done to `path`, as OutputErrors."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def _unwritable(path: Path, reason: str) -> OutputError:
    return OutputError(f"{path} cannot be written: {reason}; free space or choose another place")
