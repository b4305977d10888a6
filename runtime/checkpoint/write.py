"""Writing of safetensors, .pth and JSON files, whole or not at all: beside the name, then renamed."""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint.files import DTYPES
from runtime.errors import OutputError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path, plan: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]] | None = None
) -> int:
    """Write `path` and return its size in bytes; memory beyond what `tensors` yields: none.

    plan: name -> a tensor of the right dtype and shape, on meta when `tensors` yields the data (in the plan's
    order). Raises OutputError when the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in plan.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins aligned
    planned = iter(plan.items())
    with _replacing(path) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in plan.items() if tensors is None else tensors:
            expected_name, like = next(planned)
            if (name, tensor.shape, tensor.dtype) != (expected_name, like.shape, like.dtype):
                raise ValueError(
                    f"{name} {tensor.dtype} {tuple(tensor.shape)} differs from the plan's {expected_name}"
                )
            file.write(_bytes(tensor))
        if next(planned, None) is not None:
            raise ValueError("fewer tensors than planned")
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """torch.save of the flat dict, as the published .pth files are; returns its size in bytes."""
    # a view would drag its whole storage into the file, so each tensor gets its own
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with _replacing(path) as part:
        try:
            torch.save(plain, part)
        except RuntimeError as error:  # how torch's writer says that the disk is full
            raise _unwritable(path, str(error).splitlines()[0]) from error
    return path.stat().st_size


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON with a last newline."""
    with _replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` on success and is removed on failure."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def _unwritable(path: Path, reason: str) -> OutputError:
    return OutputError(f"{path} cannot be written: {reason}; free space or choose another place")
