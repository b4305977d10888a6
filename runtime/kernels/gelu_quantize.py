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
from runtime.kernels.row_quantize import launch_rows, row_quantize_torch
from runtime.kernels.rows import store_row


def gelu_quantize(h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h (..., F) -> (q (..., F) of dtype, s (..., 1) fp32); dtype torch.int8 or torch.float8_e4m3fn.

    Raises ValueError where h's rows are not contiguous.
    """
    return (gelu_quantize_triton if fused(h, dtype) else gelu_quantize_torch)(h, dtype)


def gelu_quantize_torch(h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The formula in plain torch."""
    return row_quantize_torch(F.gelu(h, approximate="tanh"), dtype)


def gelu_quantize_triton(h: Tensor, dtype: torch.dtype, warps: int = 0) -> tuple[Tensor, Tensor]:
    """The kernel; `warps` 0 takes the number that suits F."""
    return launch_rows(_gelu_quantize_kernel, h, dtype, warps, fuse=True)


@jit
def gelu(h):
    """0.5·h·(1 + tanh(u)) of fp32 numbers; -0 where exp overflows, as it should be."""
    u = 0.7978845608028654 * (h + 0.044715 * h * h * h)
    return h / (1.0 + tl.exp(-2.0 * u))


@jit
def _gelu_quantize_kernel(
    h, q, scales, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, INTEGER: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    h += row * WIDTH
    q += row * WIDTH
    ROUND: tl.constexpr = h.dtype.element_ty
    places = tl.arange(0, MAIN)
    a = gelu(tl.load(h + places).to(tl.float32)).to(ROUND).to(tl.float32)
    b, beyond, inside = a, places, places < WIDTH
    if TAIL:
        beyond = MAIN + tl.arange(0, TAIL)
        inside = beyond < WIDTH
        b = gelu(tl.load(h + beyond, mask=inside, other=0.0).to(tl.float32)).to(ROUND).to(tl.float32)
    store_row(a, b, q, scales + row, places, beyond, inside, TAIL, INTEGER)
