"""When the kernels run, and how: Triton is optional, and no kernel runs that did not prove to start.

Triton compiles a kernel at its first launch and needs a C compiler and a writable cache directory for it. So
"importable" is not enough: one small kernel runs first on each GPU, and where that fails every operation is
its twin in plain torch, which gives the same numbers slower.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from runtime.errors import first_line


class _Absent:
    """Stands for `triton.language` where it is not installed: enough for the kernels' signatures."""

    constexpr = int


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = _Absent()

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an older Triton, or none
    TensorDescriptor = None

HAS_TRITON = triton is not None
HAS_DESCRIPTORS = TensorDescriptor is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
E4M3 = torch.float8_e4m3fn
QMAX = {E4M3: 448.0, torch.int8: 127.0}  # the number that a row's largest entry maps to
FLOOR = 1e-30  # of a row's largest entry: a row of zeros stays zero instead of 0/0
LOWEST = {E4M3: (8, 9), torch.int8: (8, 0)}  # first compute capability that has the format


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where Triton is not installed (and nothing calls it)."""
    return triton.jit(function) if HAS_TRITON else function


_twins_only: list[bool] = []


@contextmanager
def twins() -> Iterator[None]:
    """Inside, every operation is its twin in plain torch: the safest rung, and the measure of the rest."""
    _twins_only.append(True)
    try:
        yield
    finally:
        _twins_only.pop()


def fused(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernel runs for x: on a GPU where Triton works and that has the 8-bit `dtype`, if any."""
    if _twins_only or x.device.type != "cuda":
        return False
    return capability(x.device) >= LOWEST.get(dtype, (8, 0)) and trouble(x.device) is None  # type: ignore[arg-type]


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (9, 0) for an H200."""
    return torch.cuda.get_device_capability(device)


@jit
def _double_kernel(x, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(x + places, tl.load(x + places) * 2)


@cache
def trouble(device: torch.device) -> str | None:
    """Why Triton cannot be used on this CUDA device, in a line; None when it works. Tried once a process."""
    if not HAS_TRITON:
        return "Triton is not installed"
    x = torch.arange(16, dtype=torch.float32, device=device)
    try:
        with on(x):
            _double_kernel[(1,)](x, COUNT=16, num_warps=1, enable_fp_fusion=False)
        right = torch.equal(x.cpu(), torch.arange(16, dtype=torch.float32) * 2)
    # A missing compiler, an unwritable cache or an old driver each raise something else.
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {first_line(error)}"
    return None if right else "a small kernel ran, but its numbers are wrong"


def on(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's GPU the current one, where Triton launches; on the CPU (the interpreter) nothing."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def rows_of(x: Tensor, name: str = "x") -> Tensor:
    """x (..., D) as (M, D), sharing memory; ValueError where that needs a copy or D is not contiguous."""
    if x.stride(-1) != 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} along its last axis, expected contiguous rows")
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError as error:
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} and strides {x.stride()} are no rows: make it contiguous"
        ) from error


def row_vector(vector: Tensor, width: int, name: str) -> Tensor:
    """A vector (..., width) that all rows share, as (width,) contiguous; ValueError for any other size."""
    if vector.numel() != width:
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected {width} numbers: one per column")
    return vector.reshape(-1).contiguous()


def row_parts(width: int) -> tuple[int, int]:
    """(main, tail): powers of two whose sum covers a row of `width`; tail is 0 where main is all of it.

    Triton's tiles are powers of two. One tile for 5120 columns would idle in 3 lanes of 8; 4096 + 1024 in
    none.
    """
    main = 1 << (width.bit_length() - 1)
    rest = width - main
    return main, max(1 << (rest - 1).bit_length(), 16) if rest else 0


def warps_for(width: int) -> int:
    """Warps for one row in registers: about 20 to 28 fp32 numbers in each thread."""
    return 2 if width <= 1024 else 4 if width <= 4096 else 8 if width <= 8192 else 16
