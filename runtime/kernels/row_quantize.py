"""Rows of numbers to eight bits, in one pass.

    s[m]   = max(absmax(x[m]), 1e-30) / qmax          qmax 448 for e4m3, 127 for int8; s is fp32
    q[m,k] = round(x[m,k] / s[m])                     to nearest, ties to even

x (M, K) bf16, fp16 or fp32, row-major; q (M, K), s (M, 1). One program holds one row in registers: x is
read once and q written once, 3 bytes for each bf16 entry. The kernel equals its twin bit for bit; a row
with NaN or infinity is NaN again after q*s in both.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

from typing import Any

import torch
from torch import Tensor

from runtime.kernels.launch import FLOOR, QMAX, fused, jit, on, row_parts, rows_of, tl, warps_for
from runtime.kernels.rows import store_row


def row_quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (..., K) -> (q (..., K) of dtype, s (..., 1) fp32); dtype torch.int8 or torch.float8_e4m3fn.

    Raises ValueError where x's rows are not contiguous.
    """
    return (row_quantize_triton if fused(x, dtype) else row_quantize_torch)(x, dtype)


def row_quantize_torch(x: Tensor, dtype: torch.dtype, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """The formula in plain torch; `floor` stands for a smaller largest entry."""
    scale = row_scales(x, dtype, floor)
    return to_levels(x, scale, dtype), scale


def row_scales(x: Tensor, dtype: torch.dtype, floor: float = FLOOR) -> Tensor:
    """fp32 scale of each row of x (..., K) -> (..., 1)."""
    # the infinity norm is absmax in one pass, without a copy of x
    absmax = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True).float().clamp_min(floor)
    # Divided by a tensor: CUDA turns a division by a number into a product with its rounded reciprocal, whose
    # last bit differs from the CPU's, and then entries between two levels go the other way.
    return absmax / torch.full_like(absmax, QMAX[dtype])


def to_levels(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """saturate(round(x / scale)) in the 8-bit dtype, divided in fp32; x (..., K), scale (..., 1)."""
    q = x / scale  # the fp32 scale promotes it, with no fp32 copy of x
    if dtype == torch.int8:
        q = q.round_()  # ties to even
    # The cast rounds ties to even. Above 448 older torch casts to NaN (e4m3 has no infinity): saturate first.
    return q.clamp_(-QMAX[dtype], QMAX[dtype]).to(dtype)


def row_quantize_triton(x: Tensor, dtype: torch.dtype, warps: int = 0) -> tuple[Tensor, Tensor]:
    """The kernel; `warps` 0 takes the number that suits K."""
    return launch_rows(_row_quantize_kernel, x, dtype, warps, fuse=False)


def launch_rows(
    kernel: Any,
    x: Tensor,
    dtype: torch.dtype,
    warps: int,
    *,
    fuse: bool,
    beside: tuple[Tensor, ...] = (),
    **constants: bool,
) -> tuple[Tensor, Tensor]:
    """Run a kernel that makes 8-bit rows and their scales of the rows of x.

    fuse: multiply-adds may be. beside, constants: what the kernel takes more, after x and by name.
    """
    rows = rows_of(x)
    count, width = rows.shape
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    main, tail = row_parts(width)
    if count:
        with on(x):
            kernel[(count,)](
                rows,
                *beside,
                q,
                scale,
                WIDTH=width,
                MAIN=main,
                TAIL=tail,
                INTEGER=dtype == torch.int8,
                num_warps=warps or warps_for(width),
                enable_fp_fusion=fuse,
                **constants,
            )
    return q, scale


@jit
def _row_quantize_kernel(
    x, q, scales, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, INTEGER: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x += row * WIDTH
    q += row * WIDTH
    places = tl.arange(0, MAIN)
    a = tl.load(x + places).to(tl.float32)
    b, beyond, inside = a, places, places < WIDTH
    if TAIL:
        beyond = MAIN + tl.arange(0, TAIL)
        inside = beyond < WIDTH
        b = tl.load(x + beyond, mask=inside, other=0.0).to(tl.float32)
    store_row(a, b, q, scales + row, places, beyond, inside, TAIL, INTEGER)
