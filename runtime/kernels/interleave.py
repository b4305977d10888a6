"""Four pictures of a pixel's corners become one picture of twice the height and width, in one pass.

    out[b,c,2i+u,2j+v] = round( y[b,(2u+v)C+c,i+u,j+v] + bias[c] )        u, v 0 or 1; without a bias, y

y (B, 4C, H+1, W+1) is what a 2x2 convolution makes of a picture (B, ., H, W) padded by a pixel all around;
out (B, C, 2H, 2W). Both have channels last; `Upsample.enlarge` says why that is a 3x3 convolution of the
enlarged picture. A program goes over a stretch of numbers of out as they lie: 4 bytes for each bf16 entry.
The kernel equals its twin bit for bit.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import torch
from torch import Tensor

from runtime.kernels.launch import fused, jit, on, row_vector, tl

_BLOCK = 2048


def interleave(y: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (B, 4C, H+1, W+1) -> (B, C, 2H, 2W) of its dtype, channels last; bias C numbers."""
    last = y.is_contiguous(memory_format=torch.channels_last)
    kernel = last and y.dtype != torch.float64 and fused(y)
    return (interleave_triton if kernel else interleave_torch)(y, bias)


def interleave_torch(y: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in plain torch."""
    out = _empty(y)
    wide = torch.promote_types(y.dtype, torch.float32)
    height, width = y.shape[2] - 1, y.shape[3] - 1
    for corner, part in enumerate(y.chunk(4, dim=1)):
        u, v = divmod(corner, 2)
        part = part[:, :, u : u + height, v : v + width]  # (B, C, H, W)
        out[:, :, u::2, v::2] = part if bias is None else part + bias.to(wide).view(-1, 1, 1)
    return out


def interleave_triton(y: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel; ValueError for a y that has not channels last."""
    if not y.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"y has shape {tuple(y.shape)} and strides {y.stride()}, expected channels last")
    out = _empty(y)
    batch, channels, height, width = out.shape
    count = channels * height * width
    if count:
        with on(y):
            _interleave_kernel[(-(-count // _BLOCK), batch)](
                y,
                y if bias is None else row_vector(bias, channels, "bias"),
                out,
                count,
                width,
                y[0].numel(),
                CHANNELS=channels,
                BLOCK=_BLOCK,
                BIAS=bias is not None,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return out


def _empty(y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    shape = (batch, channels // 4, 2 * (height - 1), 2 * (width - 1))
    return torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)


@jit
def _interleave_kernel(
    y,
    bias,
    out,
    count,
    width,
    y_batch,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    c = i % CHANNELS
    pixel = i // CHANNELS
    row = pixel // width
    column = pixel % width
    corner = (row % 2) * 2 + column % 2
    place = ((row + 1) // 2) * (width // 2 + 1) + (column + 1) // 2
    source = y + image * y_batch + (place.to(tl.int64) * 4 + corner) * CHANNELS + c
    value = tl.load(source, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + c, mask=there, other=0.0).to(tl.float32)
    tl.store(out + image * count + i, value.to(out.dtype.element_ty), mask=there)
