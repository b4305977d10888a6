"""The tanh-approximated GELU and the quantization of its rows, in one pass.

    g = round(h / (1 + exp(-2u))),  u = sqrt(2/pi) * (h + 0.044715 h^3)     = 0.5 h (1 + tanh u); to h's dtype
    s = max(absmax(g), 1e-30) / qmax,  q = round(g / s)                     row_quantize.py

h (..., F) bf16, fp16 or fp32, contiguous; q (..., F), s (..., 1) fp32. One program holds one row of up to
16,384 numbers in registers, so h is read once: 3 bytes for each bf16 entry, against 7 unfused. The
exponential form needs no tanh (CUDA's costs about 20 instructions); g may differ from the twin's by one
rounding.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.launch import fused, jit, tl
from runtime.kernels.row_quantize import launch_rows, row_quantize_torch, store_row

ROWS = 1  # of a program: more were slower on the H200 (0.72 ms; 0.77 to 0.92 with 2 and 4)


def gelu_quantize(h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h (..., F) -> (q (..., F) of dtype, s (..., 1) fp32); dtype torch.int8 or torch.float8_e4m3fn.

    Raises ValueError where h's rows are not contiguous.
    """
    return (gelu_quantize_triton if fused(h, dtype) else gelu_quantize_torch)(h, dtype)


def gelu_quantize_torch(h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The formula in plain torch."""
    return row_quantize_torch(F.gelu(h, approximate="tanh"), dtype)


def gelu_quantize_triton(
    h: Tensor, dtype: torch.dtype, warps: int = 0, together: int = 0
) -> tuple[Tensor, Tensor]:
    """The kernel; `warps`, and the rows of a program: 0 takes the number that suits F."""
    return launch_rows(_gelu_quantize_kernel, h, dtype, warps, together or ROWS, fuse=True)


@jit
def gelu(h):
    """0.5·h·(1 + tanh(u)) of fp32 numbers; -0 where exp overflows, as it should be."""
    u = 0.7978845608028654 * (h + 0.044715 * h * h * h)
    return h / (1.0 + tl.exp(-2.0 * u))


@jit
def _gelu_quantize_kernel(
    h,
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
    h += row * WIDTH
    q += row * WIDTH
    ROUND: tl.constexpr = h.dtype.element_ty
    places = tl.arange(0, MAIN)
    beyond = MAIN + tl.arange(0, TAIL if TAIL else 16)
    next_a = tl.load(h + places)
    next_b = tl.load(h + beyond, mask=beyond < WIDTH, other=0.0) if TAIL else next_a
    end = tl.minimum(row + ROWS, count)
    for _ in range(ROWS):
        a = gelu(next_a.to(tl.float32)).to(ROUND).to(tl.float32)
        b = gelu(next_b.to(tl.float32)).to(ROUND).to(tl.float32) if TAIL else a
        h += WIDTH
        if ROWS > 1:  # the next row is on its way while this one is computed
            more = row + 1 < end
            next_a = tl.load(h + places, mask=(places < WIDTH) & more, other=0.0)
            next_b = tl.load(h + beyond, mask=(beyond < WIDTH) & more, other=0.0) if TAIL else next_a
        store_row(a, b, q, scales + row, places, beyond, row < count, WIDTH, TAIL, INTEGER)
        q += WIDTH
        row += 1
