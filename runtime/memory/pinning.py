"""How much memory can be pinned: tried in small steps through the driver itself, and given back.

Pinned memory is what the GPU copies from at full speed. WSL2 and some containers allow little of it (0.5 to
1 GiB were reported), and no file says how much: it has to be tried. The driver's own interface is used,
because that of the runtime, which torch speaks, keeps a failed attempt as an error that the next call raises.
Works whether or not torch has started CUDA: both share the device's primary context, which counts its users.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STEP = 64 << 20
"""Bytes of one attempt."""

WANT = 512 << 20
"""Bytes that are tried unless told otherwise: more than the staging ring takes."""

LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class Pinnable:
    """bytes: what could be pinned, at most what was asked for; None if it could not be tried. error: why."""

    bytes: int | None
    error: str | None = None


class DriverError(Exception):
    """A call of the driver that failed, by name."""


def probe_pinning(want: int = WANT, device: int = 0, driver: Any = None) -> Pinnable:
    """Pin memory in steps of 64 MiB up to `want` bytes and give all of it back; never raises.

    device: the index of a GPU. driver: the library, for tests; libcuda.so.1 otherwise. Where CUDA has not
    started, most of the time goes into its context; children forked afterwards cannot use CUDA.
    """
    try:
        library = ctypes.CDLL(LIBRARY) if driver is None else driver
    except OSError:
        return Pinnable(None, f"there is no NVIDIA driver ({LIBRARY} was not found)")
    try:
        with _context(library, device):
            return _pin(library, want)
    except DriverError as error:
        return Pinnable(None, str(error))
    except AttributeError as error:  # a library that lacks the function
        return Pinnable(None, f"{LIBRARY} is no CUDA driver ({error})")


def _pin(library: Any, want: int) -> Pinnable:
    blocks: list[ctypes.c_void_p] = []
    pinned, error = 0, None
    try:
        while pinned < want:
            size = min(STEP, want - pinned)
            block = ctypes.c_void_p()
            code = library.cuMemHostAlloc(ctypes.byref(block), ctypes.c_size_t(size), ctypes.c_uint(0))
            if code:
                error = (
                    f"the driver refused {size >> 20} MiB after {pinned >> 20} MiB ({_name(library, code)})"
                )
                break
            blocks.append(block)
            pinned += size
    finally:
        for block in blocks:
            library.cuMemFreeHost(block)
    return Pinnable(pinned, error)


@contextmanager
def _context(library: Any, device: int) -> Iterator[None]:
    """The device's primary context, current for the block; left as it was found."""
    handle, context, popped = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    _check(library, "cuInit", ctypes.c_uint(0))
    _check(library, "cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
    _check(library, "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    try:
        _check(library, "cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            library.cuCtxPopCurrent_v2(ctypes.byref(popped))
    finally:
        library.cuDevicePrimaryCtxRelease_v2(handle)


def _check(library: Any, function: str, *arguments: Any) -> None:
    """Call the driver; DriverError with the name of what it answers."""
    code = getattr(library, function)(*arguments)
    if code:
        raise DriverError(f"{function} failed ({_name(library, code)})")


def _name(library: Any, code: int) -> str:
    """`CUDA_ERROR_OUT_OF_MEMORY` for 2."""
    text = ctypes.c_char_p()
    if library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text)) or not text.value:
        return f"error {code}"
    return text.value.decode()
