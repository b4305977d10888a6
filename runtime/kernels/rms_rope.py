"""RMSNorm over the full width, then rotary positions, in one pass, in place or to another place.

    n = x / sqrt(mean(x^2) + eps) * weight                          fp32, over the row of all heads
    x[2j]   <- round(n[2j] * cos[j] - n[2j+1] * sin[j])             in each head, j < head_dim/2
    x[2j+1] <- round(n[2j] * sin[j] + n[2j+1] * cos[j])
    without a table: x <- round(n)

x (B, L, H*head_dim) or (L, H*head_dim) bf16, fp16 or fp32, contiguous; weight (H*head_dim,); cos and sin
(L, head_dim/2) fp32, one row for each token, shared by heads and batch. Pairs are neighbours, so a head is
a tile of (head_dim/2, 2) whose last axis is split in registers. Nothing is rounded between norm and
rotation. One program holds one row: 4 bytes for each bf16 entry, where norm and rotation apart need 8 and
more.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.launch import fused, jit, on, row_parts, row_vector, rows_of, tl, warps_for

Table = tuple[Tensor, Tensor]  # cos and sin, each (L, head_dim/2), with axes of length 1 anywhere


def rms_rope(
    x: Tensor,
    weight: Tensor,
    eps: float,
    head_dim: int,
    table: Table | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """RMSNorm and, with `table`, rotation of x (..., L, H·head_dim), in place or into a tensor like it.

    Returns where the result is. Raises ValueError where x or it is not contiguous or sizes do not agree.
    """
    power_of_two = head_dim & (head_dim - 1) == 0
    run = rms_rope_triton if power_of_two and fused(x) else rms_rope_torch
    return run(x, weight, eps, head_dim, table, into)


def rms_rope_torch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    head_dim: int,
    table: Table | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """The formula in plain torch."""
    target = x if into is None else into
    normed = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    if table is None:
        return target.copy_(normed)
    cos, sin = checked_table(x, head_dim, table)
    pairs = normed.unflatten(-1, (-1, head_dim // 2, 2))
    real, imaginary = pairs.unbind(-1)  # (..., L, H, head_dim/2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = target.view(pairs.shape)
    out[..., 0] = real * cos - imaginary * sin
    out[..., 1] = real * sin + imaginary * cos
    return target


def checked_table(x: Tensor, head_dim: int, table: Table) -> Table:
    """cos and sin as (L, head_dim/2); ValueError where they do not fit x."""
    cos, sin = (part.reshape(-1, head_dim // 2) for part in table)
    expected = (x.shape[-2], head_dim // 2)
    if cos.shape != expected or sin.shape != expected:
        raise ValueError(
            f"cos and sin are {tuple(cos.shape)} and {tuple(sin.shape)}, expected {expected}: a row per token"
        )
    return cos, sin


def rms_rope_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    head_dim: int,
    table: Table | None = None,
    into: Tensor | None = None,
    warps: int = 0,
) -> Tensor:
    """The kernel, for heads whose width is a power of two; `warps` 0 takes the number that suits the row."""
    rows = rows_of(x)
    count, width = rows.shape
    out = rows if into is None else rows_of(into, "into")
    if out.shape != rows.shape or out.dtype != rows.dtype:
        raise ValueError(f"the result goes to {tuple(out.shape)} {out.dtype}, expected what x is")
    if width % head_dim:
        raise ValueError(f"rows of {width} do not split into heads of {head_dim}")
    cos, sin = (rows, rows) if table is None else checked_table(x, head_dim, table)
    main, tail = row_parts(width // head_dim)
    if count:
        with on(x):
            _rms_rope_kernel[(count,)](
                rows,
                out,
                row_vector(weight, width, "weight"),
                cos.contiguous(),
                sin.contiguous(),
                x.shape[-2] if x.ndim > 1 else 1,
                eps,
                WIDTH=width,
                HEAD=head_dim,
                MAIN=main,
                TAIL=tail,
                ROPE=table is not None,
                num_warps=warps or warps_for(width),
                enable_fp_fusion=True,
            )
    return x if into is None else into


@jit
def turned(n, cos, sin, HEADS: tl.constexpr, HEAD: tl.constexpr):
    """Pairs of n (HEADS, HEAD) turned by cos and sin (HEAD/2,)."""
    real, imaginary = tl.split(tl.reshape(n, (HEADS, HEAD // 2, 2)))
    cos, sin = cos[None, :], sin[None, :]
    turned = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    return tl.reshape(turned, (HEADS, HEAD))


@jit
def _rms_rope_kernel(
    x,
    out,
    weight,
    cos,
    sin,
    tokens,
    eps,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROPE: tl.constexpr,
):
    row = tl.program_id(0)
    x += row.to(tl.int64) * WIDTH
    out += row.to(tl.int64) * WIDTH
    lanes = tl.arange(0, HEAD)[None, :]
    places = tl.arange(0, MAIN)[:, None] * HEAD + lanes  # (MAIN, HEAD): heads are rows of a tile
    a = tl.load(x + places).to(tl.float32)
    squares = tl.sum(tl.sum(a * a, axis=1), axis=0)
    if TAIL:
        beyond = (MAIN + tl.arange(0, TAIL))[:, None] * HEAD + lanes
        inside = beyond < WIDTH
        b = tl.load(x + beyond, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(tl.sum(b * b, axis=1), axis=0)
    inverse = 1.0 / tl.sqrt(squares / WIDTH + eps)
    a = a * inverse * tl.load(weight + places).to(tl.float32)
    if TAIL:
        b = b * inverse * tl.load(weight + beyond, mask=inside, other=0.0).to(tl.float32)
    if ROPE:
        half = (row % tokens) * (HEAD // 2) + tl.arange(0, HEAD // 2)
        c = tl.load(cos + half)
        s = tl.load(sin + half)
        a = turned(a, c, s, MAIN, HEAD)
        if TAIL:
            b = turned(b, c, s, TAIL, HEAD)
    tl.store(out + places, a.to(out.dtype.element_ty))
    if TAIL:
        tl.store(out + beyond, b.to(out.dtype.element_ty), mask=inside)
