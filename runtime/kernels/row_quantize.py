"""Rows of numbers to eight bits, in one pass.

    s[m]   = max(absmax(x[m]), 1e-30) / qmax          qmax 448 for e4m3, 127 for int8; s is fp32
    q[m,k] = round(x[m,k] / s[m])                     to nearest, ties to even

x (M, K) bf16, fp16 or fp32, row-major; q (M, K), s (M, 1). One program holds one row in registers, and
does some of them in turn: x is read once and q written once, 3 bytes for each bf16 entry. The kernel equals
its twin bit for bit; a row with NaN or infinity is NaN again after q*s in both.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

from typing import Any

import torch
from torch import Tensor

from runtime.kernels.launch import FLOOR, QMAX, fused, jit, on, row_parts, rows_of, tl, warps_for
from runtime.kernels.rows import absmax_bits, quantized, row_scale

ROWS = 4  # of a program: 0.178 against 0.186 ms for 32,760 rows of 5,120 on the H200


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


def row_quantize_triton(
    x: Tensor, dtype: torch.dtype, warps: int = 0, together: int = 0
) -> tuple[Tensor, Tensor]:
    """The kernel; `warps`, and the rows of a program: 0 takes the number that suits K."""
    return launch_rows(_row_quantize_kernel, x, dtype, warps, together or ROWS, fuse=False)


def launch_rows(
    kernel: Any, x: Tensor, dtype: torch.dtype, warps: int, together: int, *, fuse: bool
) -> tuple[Tensor, Tensor]:
    """Run a kernel that makes 8-bit rows and their scales of the rows of x, `together` in each program.

    fuse: whether multiply-adds may be.
    """
    rows = rows_of(x)
    count, width = rows.shape
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = room_for_scales(x, together)
    main, tail = row_parts(width)
    if count:
        with on(x):
            kernel[(-(-count // together),)](
                rows,
                q,
                scale,
                count,
                WIDTH=width,
                MAIN=main,
                TAIL=tail,
                ROWS=together,
                INTEGER=dtype == torch.int8,
                num_warps=warps or warps_for(width),
                enable_fp_fusion=fuse,
            )
    return q, scale


def room_for_scales(x: Tensor, together: int) -> Tensor:
    """(..., 1) fp32 for the rows of x (..., K), with room behind it for the rows that the last program lacks.

    So a scale is stored without asking: older interpreters of Triton do not look at the mask of one number.
    """
    rows = x.numel() // x.shape[-1]
    room = torch.empty(-(-rows // together) * together, dtype=torch.float32, device=x.device)
    return room[:rows].view(*x.shape[:-1], 1)


@jit
def _row_quantize_kernel(
    x,
    q,
    scales,
    count,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS
    x += row * WIDTH
    q += row * WIDTH
    places = tl.arange(0, MAIN)
    beyond = MAIN + tl.arange(0, TAIL if TAIL else 16)
    next_a = tl.load(x + places)
    next_b = tl.load(x + beyond, mask=beyond < WIDTH, other=0.0) if TAIL else next_a
    end = tl.minimum(row + ROWS, count)
    for _ in range(ROWS):
        a = next_a.to(tl.float32)
        b = next_b.to(tl.float32)
        x += WIDTH
        if ROWS > 1:  # the next row is on its way while this one is looked through
            more = row + 1 < end
            next_a = tl.load(x + places, mask=(places < WIDTH) & more, other=0.0)
            next_b = tl.load(x + beyond, mask=(beyond < WIDTH) & more, other=0.0) if TAIL else next_a
        store_row(a, b, q, scales + row, places, beyond, row < count, WIDTH, TAIL, INTEGER)
        q += WIDTH
        row += 1


@jit
def store_row(
    a,
    b,
    q,
    place,
    places,
    beyond,
    there,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """Quantize a row in two parts, fp32; stored where it is `there`, its scale anyhow. No TAIL, no b."""
    bits = absmax_bits(a)
    if TAIL:
        bits = tl.maximum(bits, absmax_bits(b))
    scale, reciprocal, stored = row_scale(bits, INTEGER)
    tl.store(place, stored)
    tl.store(q + places, quantized(a, scale, reciprocal, INTEGER), mask=(places < WIDTH) & there)
    if TAIL:
        tl.store(q + beyond, quantized(b, scale, reciprocal, INTEGER), mask=(beyond < WIDTH) & there)
