"""Rows of numbers to eight bits and back: the formulas that both formats share.

  s[m]   = max(absmax(x[m]), floor) / qmax          qmax 448 for e4m3, 127 for int8; s is fp32
  q[m,k] = saturate(round(x[m,k] / s[m]))           round to nearest, ties to even
  x     ~= q * s

e4m3 (`torch.float8_e4m3fn`): sign, 4 bits of exponent, 3 of mantissa; largest 448, no infinity, steps of 2^-9
below 2^-6. Its relative step is 2^-3, so a Gaussian row comes back with an RMS error of about 2.7 % of its
RMS; int8, whose step is absmax/127 everywhere, with about 0.9 %, and with more when a row has outliers.

Activations are quantized per token when they arrive (a row is a token), weights per output channel by the
converter (a row is a channel). The floor keeps a row of zeros at zero instead of 0/0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.launch import E4M3, FLOOR, QMAX
from runtime.kernels.row_quantize import row_quantize_torch, row_scales, to_levels

WEIGHT_FLOOR = 1e-5  # of LightX2V's converter, so that files written here equal files written there


@dataclass(frozen=True)
class Format:
    """An eight-bit format: torch dtype, the number that a row's largest entry maps to, integers or not."""

    name: str
    dtype: torch.dtype
    qmax: float
    integer: bool


FP8 = Format("fp8", E4M3, QMAX[E4M3], integer=False)
INT8 = Format("int8", torch.int8, QMAX[torch.int8], integer=True)
FORMATS = {"fp8": FP8, "int8": INT8}


def quantize_rows(x: Tensor, form: Format, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """Quantize each row of x (..., K), floating: (q (..., K) of the format's dtype, scale (..., 1) fp32).

    A row with NaN or infinity gives NaN again after scaling, so checks downstream see it.
    """
    return row_quantize_torch(x, form.dtype, floor)


def quantize_weight(
    weight: Tensor, form: Format, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Quantize a matrix (out, in) per output channel: (q, scale (out, 1) of scale_dtype).

    The entries are divided by the scale as it is stored, so a coarse scale_dtype adds no error of its own to
    weight * scale. (LightX2V's converter divides in the source's dtype; here it is fp32 always.)
    """
    scale = row_scales(weight, form.dtype, WEIGHT_FLOOR).to(scale_dtype)
    # fp16 has no room for the floor's scale: such a row takes the smallest scale that there is, 2^-24.
    scale = torch.where(scale == 0, 2.0**-24, scale).to(scale_dtype)
    return to_levels(weight, scale.float(), form.dtype), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """W = weight * scale, in fp32, then one rounding to dtype; weight (out, in), scale (out, 1) fp32."""
    return (weight.float() * scale.float()).to(dtype)
