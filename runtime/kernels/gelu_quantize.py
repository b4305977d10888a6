"""The tanh-approximated GELU, a factor where it gates one, and the quantization of the rows, in one pass.

    g = round(h / (1 + exp(-2u))),  u = sqrt(2/pi) * (h + 0.044715 h^3)     = 0.5 h (1 + tanh u); to h's dtype
    g = round(g * factor)                                                   only with a factor; to h's dtype
    s = max(absmax(g), 1e-30) / qmax,  q = round(g / s)                     row_quantize.py

h and factor (..., F) bf16, fp16 or fp32, contiguous; q (..., F), s (..., 1) fp32. One program holds one row
of up to 16,384 numbers in registers, so h is read once: 3 bytes for each bf16 entry, against 7 unfused; 5
against 13 with a factor. The
exponential form needs no tanh (CUDA's costs about 20 instructions); g may differ from the twin's by one
rounding.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.launch import fused, jit, rows_of, tl
from runtime.kernels.row_quantize import launch_rows, row_quantize_torch
from runtime.kernels.rows import store_row


def gelu_quantize(h: Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h and factor (..., F) -> (q (..., F) of dtype, s (..., 1) fp32).

    dtype: torch.int8 or torch.float8_e4m3fn. Raises ValueError where rows are not contiguous or the factor's
    shape is not h's.
    """
    return (gelu_quantize_triton if fused(h, dtype) else gelu_quantize_torch)(h, dtype, factor)


def gelu_quantize_torch(h: Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formula in plain torch."""
    g = F.gelu(h, approximate="tanh")
    return row_quantize_torch(g if factor is None else g * factor, dtype)


def gelu_quantize_triton(
    h: Tensor, dtype: torch.dtype, factor: Tensor | None = None, warps: int = 0
) -> tuple[Tensor, Tensor]:
    """The kernel; `warps` 0 takes the number that suits F."""
    if factor is not None and factor.shape != h.shape:
        raise ValueError(f"factor has shape {tuple(factor.shape)}, expected that of h, {tuple(h.shape)}")
    beside = rows_of(h) if factor is None else rows_of(factor, "factor")
    gates = factor is not None
    return launch_rows(_gelu_quantize_kernel, h, dtype, warps, fuse=True, beside=(beside,), GATES=gates)


@jit
def gelu(h):
    """0.5·h·(1 + tanh(u)) of fp32 numbers; -0 where exp overflows, as it should be."""
    u = 0.7978845608028654 * (h + 0.044715 * h * h * h)
    return h / (1.0 + tl.exp(-2.0 * u))


@jit
def _activated(value, more, ROUND: tl.constexpr, GATES: tl.constexpr):
    """The GELU of part of a row and its product with `more`, each rounded; fp32."""
    g = gelu(value.to(tl.float32)).to(ROUND).to(tl.float32)
    if GATES:
        g = (g * more.to(tl.float32)).to(ROUND).to(tl.float32)
    return g


@jit
def _gelu_quantize_kernel(
    h,
    factor,
    q,
    scales,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    GATES: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h += row * WIDTH
    factor += row * WIDTH
    q += row * WIDTH
    ROUND: tl.constexpr = h.dtype.element_ty
    places = tl.arange(0, MAIN)
    value = tl.load(h + places)
    a = _activated(value, tl.load(factor + places) if GATES else value, ROUND, GATES)
    b, beyond, inside = a, places, places < WIDTH
    if TAIL:
        beyond = MAIN + tl.arange(0, TAIL)
        inside = beyond < WIDTH
        last = tl.load(h + beyond, mask=inside, other=0.0)
        b = _activated(
            last, tl.load(factor + beyond, mask=inside, other=0.0) if GATES else last, ROUND, GATES
        )
    store_row(a, b, q, scales + row, places, beyond, inside, TAIL, INTEGER)
