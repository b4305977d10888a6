"""The VAE's channel norm and the SiLU after it, in one pass, with the bias of the convolution before them.

    v[b,c,p] = x[b,c,p] + bias[c]                                         fp32; without a bias, x
    n[b,c,p] = v[b,c,p] * sqrt(C) / max(|v[b,:,p]|, 1e-12) * gamma[c]     |.| Euclidean over channels, in fp32
    y[b,c,p] = round( n / (1 + exp(-n)) )                                 one rounding; round(n) without SiLU

x (B, C, positions...) bf16, fp16 or fp32. Channels or positions may lie together, and x may be a part of a
larger tensor (`runtime/kernels/positions.py` says which): a crop of a picture, a range of channels or frames.
The result may be such a view too (a part of a convolution's input that holds other frames besides), in either
order. One program holds all channels of a few positions: 4 bytes for each bf16 entry, where norm and SiLU
apart need 10 and more.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.launch import fused, jit, on, row_parts, row_vector, tl
from runtime.kernels.positions import same_runs

_TILE = 4096  # numbers of the larger of the two tiles that a program holds


def norm_silu(
    x: Tensor, gamma: Tensor, silu: bool = True, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x (B, C, ...) -> y of its shape, dtype and layout, or into `out`, which may be x.

    gamma and bias have C numbers each.
    """
    if out is None:
        out = torch.empty_like(x)
    kernel = x.dtype != torch.float64 and fused(x) and same_runs(x, out) is not None
    return (norm_silu_triton if kernel else norm_silu_torch)(x, gamma, silu, out, bias)


def norm_silu_torch(
    x: Tensor, gamma: Tensor, silu: bool = True, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The formula in plain torch; in float64 for a float64 x."""
    wide, column = torch.promote_types(x.dtype, torch.float32), (-1, *[1] * (x.ndim - 2))
    v = x if bias is None else x + bias.to(wide).reshape(column)
    size = torch.linalg.vector_norm(v, dim=1, keepdim=True, dtype=wide).clamp_min(1e-12)  # (B, 1, ...)
    y = v * (math.sqrt(x.shape[1]) / size) * gamma.to(wide).reshape(column)
    y = F.silu(y) if silu else y
    return y.to(x.dtype) if out is None else out.copy_(y)


def norm_silu_triton(
    x: Tensor, gamma: Tensor, silu: bool = True, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The kernel; ValueError where the positions of x and out do not lie in runs of one width."""
    if out is None:
        out = torch.empty_like(x)
    if out.shape != x.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, expected that of x, {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    runs = same_runs(x, out)
    if runs is None:
        raise ValueError(f"positions of x {x.stride()} and out {out.stride()} lie in no common runs")
    main, tail = row_parts(channels)
    # Positions that lie together are read 32 at a time at least, for whole sectors of memory.
    block = max(_TILE // main, 4 if x.stride(1) == 1 else 32)
    factor = row_vector(gamma, channels, "gamma")
    if x.numel():
        with on(x):
            _norm_silu_kernel[(-(-positions // block), batch)](
                x,
                factor,
                factor if bias is None else row_vector(bias, channels, "bias"),
                out,
                positions,
                runs[0].width,
                x.stride(0),
                x.stride(1),
                runs[0].row,
                runs[0].step,
                out.stride(0),
                out.stride(1),
                runs[1].row,
                runs[1].step,
                math.sqrt(channels),
                CHANNELS=channels,
                MAIN=main,
                TAIL=tail,
                BLOCK=block,
                SILU=silu,
                BIAS=bias is not None,
                num_warps=4 if main * block <= _TILE else 8,
                enable_fp_fusion=True,
            )
    return out


@jit
def _part(x, gamma, channels, root, inside, inverse, SILU: tl.constexpr):
    """Normed (and activated) part of a tile from its fp32 numbers."""
    factor = tl.load(gamma + channels, mask=inside, other=0.0).to(tl.float32)
    y = x * inverse[None, :] * (factor * root)[:, None]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@jit
def _norm_silu_kernel(
    x,
    gamma,
    bias,
    out,
    positions,
    width,
    x_batch,
    x_channel,
    x_row,
    x_step,
    out_batch,
    out_channel,
    out_row,
    out_step,
    root,
    CHANNELS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = (p < positions)[None, :]
    row = (p // width).to(tl.int64)[None, :]
    column = (p % width).to(tl.int64)[None, :]
    x += image * x_batch
    out += image * out_batch
    x_place = row * x_row + column * x_step  # (1, BLOCK)
    out_place = row * out_row + column * out_step
    c = tl.arange(0, MAIN)
    channel = c.to(tl.int64)[:, None]
    a = tl.load(x + channel * x_channel + x_place, mask=there, other=0.0).to(tl.float32)  # (MAIN, BLOCK)
    if BIAS:
        a += tl.load(bias + c).to(tl.float32)[:, None]
    squares = tl.sum(a * a, axis=0)
    if TAIL:
        d = MAIN + tl.arange(0, TAIL)
        beyond = d.to(tl.int64)[:, None]
        inside = (d < CHANNELS)[:, None] & there
        b = tl.load(x + beyond * x_channel + x_place, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            b += tl.load(bias + d, mask=d < CHANNELS, other=0.0).to(tl.float32)[:, None]
        squares += tl.sum(b * b, axis=0)
    size = tl.maximum(tl.sqrt(squares), 1e-12, propagate_nan=tl.PropagateNan.ALL)
    inverse = 1.0 / size
    a = _part(a, gamma, c, root, c < CHANNELS, inverse, SILU)
    tl.store(out + channel * out_channel + out_place, a.to(out.dtype.element_ty), mask=there)
    if TAIL:
        b = _part(b, gamma, d, root, d < CHANNELS, inverse, SILU)
        tl.store(out + beyond * out_channel + out_place, b.to(out.dtype.element_ty), mask=inside)
