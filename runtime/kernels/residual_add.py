"""A residual block's end in one pass, in place: a convolution's result, its bias, and the block's input.

    y[b,c,p] <- round( y[b,c,p] + bias[c] + x[b,c,p] )        fp32 sums in this order, one rounding

y and x (B, C, positions...) of one dtype, both with channels last: y whole, x whole or a rectangle cut out of
a larger picture; bias C numbers. A program goes over a stretch of numbers of y as they lie: 6 bytes for each
bf16 entry, where torch's convolution makes a pass of 4 bytes for the bias alone. The kernel equals its twin
bit for bit.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import math

import torch
from torch import Tensor

from runtime.kernels.launch import fused, jit, on, row_vector, tl
from runtime.kernels.positions import Runs, same_runs

_BLOCK = 2048


def residual_add(y: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """y + bias + x, in place of y; y and x (B, C, ...), bias C numbers. Returns y."""
    kernel = y.dtype != torch.float64 and fused(y) and _lines(y, x) is not None
    return (residual_add_triton if kernel else residual_add_torch)(y, x, bias)


def residual_add_torch(y: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """The formula in plain torch; in float64 for a float64 y."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.copy_(y.to(wide) + bias.to(wide).reshape(-1, *[1] * (y.ndim - 2)) + x)


def residual_add_triton(y: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """The kernel; ValueError for other shapes or another order of channels and positions."""
    if x.shape != y.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected that of y, {tuple(y.shape)}")
    lines = _lines(y, x)
    if lines is None:
        raise ValueError(f"y {y.stride()} and x {x.stride()} do not both have channels last")
    batch, channels = y.shape[:2]
    count = channels * math.prod(y.shape[2:])
    if count:
        with on(y):
            _residual_add_kernel[(-(-count // _BLOCK), batch)](
                y,
                x,
                row_vector(bias, channels, "bias"),
                count,
                lines[0].width * channels,
                y.stride(0),
                lines[0].row,
                x.stride(0),
                lines[1].row,
                CHANNELS=channels,
                BLOCK=_BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return y


def _lines(y: Tensor, x: Tensor) -> tuple[Runs, Runs] | None:
    """The runs of both; None unless a run's numbers lie together, channels innermost."""
    channels, runs = y.shape[1], same_runs(y, x)
    if runs is None or any(channels > 1 and t.stride(1) != 1 for t in (y, x)):
        return None
    return None if any(one.step != channels and one.width > 1 for one in runs) else runs


@jit
def _residual_add_kernel(
    y,
    x,
    bias,
    count,
    line,
    y_batch,
    y_row,
    x_batch,
    x_row,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    number = (i // line).to(tl.int64)
    inside = i % line
    y += image * y_batch + number * y_row + inside
    x += image * x_batch + number * x_row + inside
    add = tl.load(bias + i % CHANNELS, mask=there, other=0.0).to(tl.float32)
    total = tl.load(y, mask=there, other=0.0).to(tl.float32) + add
    total += tl.load(x, mask=there, other=0.0).to(tl.float32)
    tl.store(y, total.to(y.dtype.element_ty), mask=there)
