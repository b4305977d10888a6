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

ACTIVATION_FLOOR = 1e-30  # any number that divides safely: the scale stays a normal fp32 number
WEIGHT_FLOOR = 1e-5  # of LightX2V's converter, so that files written here equal files written there


@dataclass(frozen=True)
class Format:
    """An eight-bit format: torch dtype, the number that a row's largest entry maps to, integers or not."""

    name: str
    dtype: torch.dtype
    qmax: float
    integer: bool


FP8 = Format("fp8", torch.float8_e4m3fn, 448.0, integer=False)
INT8 = Format("int8", torch.int8, 127.0, integer=True)
FORMATS = {"fp8": FP8, "int8": INT8}


def row_scales(x: Tensor, form: Format, floor: float = ACTIVATION_FLOOR) -> Tensor:
    """fp32 scale of each row of x (..., K) -> (..., 1)."""
    # the infinity norm is absmax in one pass, without a copy of x
    absmax = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True).float().clamp_min(floor)
    # Divided by a tensor: CUDA turns a division by a number into a product with its rounded reciprocal, whose
    # last bit differs from the CPU's, and then entries between two levels go the other way.
    return absmax / torch.full_like(absmax, form.qmax)


def to_format(x: Tensor, scale: Tensor, form: Format) -> Tensor:
    """saturate(round(x / scale)) in the format's dtype, divided in fp32; x (..., K), scale (..., 1)."""
    q = x / scale  # the fp32 scale promotes it, with no fp32 copy of x
    if form.integer:
        q = q.round_()  # ties to even
    # The cast rounds ties to even. Above 448 older torch casts to NaN (e4m3 has no infinity): saturate first.
    return q.clamp_(-form.qmax, form.qmax).to(form.dtype)


def quantize_rows(x: Tensor, form: Format, floor: float = ACTIVATION_FLOOR) -> tuple[Tensor, Tensor]:
    """Quantize each row of x (..., K), floating: (q (..., K) of the format's dtype, scale (..., 1) fp32).

    A row with NaN or infinity gives NaN again after scaling, so checks downstream see it.
    """
    scale = row_scales(x, form, floor)
    return to_format(x, scale, form), scale


def quantize_weight(
    weight: Tensor, form: Format, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Quantize a matrix (out, in) per output channel: (q, scale (out, 1) of scale_dtype).

    The entries are divided by the scale as it is stored, so a coarse scale_dtype adds no error of its own to
    weight * scale. (LightX2V's converter divides in the source's dtype; here it is fp32 always.)
    """
    scale = row_scales(weight, form, WEIGHT_FLOOR).to(scale_dtype)
    # fp16 has no room for the floor's scale: such a row takes the smallest scale that there is, 2^-24.
    scale = torch.where(scale == 0, 2.0**-24, scale).to(scale_dtype)
    return to_format(weight, scale.float(), form), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """W = weight * scale, in fp32, then one rounding to dtype; weight (out, in), scale (out, 1) fp32."""
    return (weight.float() * scale.float()).to(dtype)
