"""RMSNorm, rotary positions, and e4m3 for an attention in eight bits, in one pass over q or k.

    n   = round16(x / sqrt(mean(x^2) + eps) * weight, turned by the table)      what `rms_rope` stores
    z_h = n_h · R                                   per head h; R (D, D) of 1 and -1: `hadamard`
    out = e4m3((z_h - center_h) * factor_h)         fp32 until here; NaN for what is not finite, 448 at most

x (..., L, H·D) bf16 or fp16, contiguous, rows of all heads; weight (H·D,); cos and sin (L, D/2) fp32; factor
(H,) and center (H, D) fp32, center already times R; out (..., L, H·D) e4m3. 3 bytes for each entry, where
`rms_rope` and `to_eight_bits` need 7.

A program is one warp and has one row, so that no warp waits for another. It reads the row twice, to square it
and then eight heads at a time, the second time from its cache. R is the product of two Hadamard matrices, of
16 for the upper four bits of a channel's number and of D/16 for the others: the tensor cores multiply by the
first, exactly (signs times 16-bit numbers, summed in fp32); sums and differences are the second. Where D is
128 a thread reads, turns, multiplies and stores the same channels throughout, and nothing is exchanged: the
order of channels in the product is the one in which threads have read them.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

import torch
from torch import Tensor

from runtime.kernels.attention_quantize import check_head_dim, rotated, signs_of
from runtime.kernels.launch import E4M3, QMAX, fused, jit, on, row_vector, tl
from runtime.kernels.rms_rope import Table, checked_table, rms_rope_torch, turned

_SLICE = 512  # tokens that the twin does at a time: a few of its fp32 copies are 10 MB each at 5,120


def rms_rope_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    head_dim: int,
    factor: Tensor,
    center: Tensor | None = None,
    table: Table | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """x (..., L, H·head_dim) -> the same in e4m3, as this file's formulas say; `into` is where it goes.

    factor (H,) fp32; center (H, head_dim) fp32, times R, zeros unless given. Raises ValueError for a head_dim
    that is no power of two from 16 to 128, for sizes that do not agree, and where x or `into` is not
    contiguous.
    """
    run = rms_rope_quantize_triton if x.itemsize == 2 and fused(x, E4M3) else rms_rope_quantize_torch
    return run(x, weight, eps, head_dim, factor, center, table, into)


def rms_rope_quantize_torch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    head_dim: int,
    factor: Tensor,
    center: Tensor | None = None,
    table: Table | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """The formula in plain torch, some tokens at a time."""
    out, heads = _checked(x, head_dim, factor, center, into)
    turns = None if table is None else checked_table(x, head_dim, table)
    by = factor.reshape(heads, 1).float()
    for start in range(0, x.shape[-2], _SLICE):
        part = slice(start, start + _SLICE)
        turn = None if turns is None else (turns[0][part], turns[1][part])
        given = x[..., part, :]
        n = rms_rope_torch(
            given, weight, eps, head_dim, turn, torch.empty(given.shape, dtype=x.dtype, device=x.device)
        )
        y = rotated(n.unflatten(-1, (heads, head_dim)))  # (..., L, H, D)
        if center is not None:
            y -= center
        y *= by
        y += y - y  # NaN for infinity: e4m3 has none, and its largest number would look healthy
        out[..., part, :] = y.clamp_(-QMAX[E4M3], QMAX[E4M3]).flatten(-2).to(E4M3)
    return out


def _checked(
    x: Tensor, head_dim: int, factor: Tensor, center: Tensor | None, into: Tensor | None
) -> tuple[Tensor, int]:
    """Where the result goes, and the number of heads; ValueError for what does not agree."""
    check_head_dim(head_dim)
    heads, rest = divmod(x.shape[-1], head_dim)
    if rest:
        raise ValueError(f"rows of {x.shape[-1]} do not split into heads of {head_dim}")
    if factor.numel() != heads:
        raise ValueError(f"factor has shape {tuple(factor.shape)}, expected {heads} numbers: one per head")
    if center is not None and center.shape != (heads, head_dim):
        raise ValueError(f"center has shape {tuple(center.shape)}, expected {(heads, head_dim)}")
    if into is None:
        into = torch.empty(x.shape, dtype=E4M3, device=x.device)
    elif into.shape != x.shape or into.dtype != E4M3:
        raise ValueError(
            f"the result goes to {tuple(into.shape)} {into.dtype}, expected {tuple(x.shape)} e4m3"
        )
    for name, tensor in (("x", x), ("into", into)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous rows")
    return into, heads


def rms_rope_quantize_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    head_dim: int,
    factor: Tensor,
    center: Tensor | None = None,
    table: Table | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """The kernel. ValueError for x that is not of 16 bits, too."""
    if x.itemsize != 2:
        raise ValueError(f"x is {x.dtype}, expected bf16 or fp16: its numbers are multiplied as they are")
    out, _ = _checked(x, head_dim, factor, center, into)
    width = x.shape[-1]
    cos, sin = (x, x) if table is None else checked_table(x, head_dim, table)
    if x.numel():
        with on(x):
            _rms_rope_quantize_kernel[(x.numel() // width,)](
                x,
                out,
                row_vector(weight, width, "weight"),
                cos.contiguous(),
                sin.contiguous(),
                factor if center is None else center.contiguous(),
                factor.contiguous(),
                x.shape[-2],
                eps,
                WIDTH=width,
                HEAD=head_dim,
                HEADS=max(8, 256 // head_dim),
                ROPE=table is not None,
                CENTER=center is not None,
                num_warps=1,
                num_stages=1,
                enable_fp_fusion=True,
            )
    return out


@jit
def _signs(like):
    """The Hadamard matrix (16, 16) in the dtype that `like` points to, rows in the order of `_rotated`."""
    given = tl.arange(0, 16)
    upper = given % 4 * 4 + given // 4
    return signs_of(upper[:, None] & tl.arange(0, 16)[None, :], like)


@jit
def _rotated(n, signs, HEADS: tl.constexpr, HEAD: tl.constexpr):
    """n (HEADS, HEAD) of 16 bits times the Hadamard matrix of HEAD; (2·HEADS, HEAD/2) fp32, halves of heads.

    Channel c = upper·LOWER + lower. The tensor cores take four neighbours of each row of 16 from a thread,
    and it has read eight channels of each quarter of a head: those four are of four quarters.
    """
    LOWER: tl.constexpr = HEAD // 16
    n = tl.permute(tl.reshape(n, (HEADS, 4, 4, LOWER)), (3, 0, 2, 1))
    y = tl.dot(tl.reshape(n, (LOWER * HEADS, 16)), signs)
    y = tl.permute(tl.reshape(y, (LOWER, HEADS, 16)), (1, 2, 0))
    y = tl.reshape(y, (HEADS * 16, LOWER))
    for bit in tl.static_range(4):  # the highest bit of `lower` becomes its lowest, until all had their turn
        if LOWER >> bit > 1:
            one, other = tl.split(tl.permute(tl.reshape(y, (HEADS * 16, 2, LOWER // 2)), (0, 2, 1)))
            y = tl.reshape(tl.join(one + other, one - other), (HEADS * 16, LOWER))
    y = tl.permute(tl.reshape(y, (HEADS, 2, HEAD // 2)), (1, 0, 2))
    return tl.reshape(y, (2 * HEADS, HEAD // 2))


@jit
def _rms_rope_quantize_kernel(
    x,
    out,
    weight,
    cos,
    sin,
    center,
    factor,
    tokens,
    eps,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    ROPE: tl.constexpr,
    CENTER: tl.constexpr,
):
    row = tl.program_id(0)
    x += row.to(tl.int64) * WIDTH
    out += row.to(tl.int64) * WIDTH
    STEP: tl.constexpr = HEADS * HEAD
    # Rows of a tile are a quarter of some heads, then the next: so the warp lies along the heads, and its
    # threads have a part of each quarter. What is stored is laid out likewise, in halves.
    quarters = tl.arange(0, 4 * HEADS)[:, None]
    places = quarters % HEADS * HEAD + quarters // HEADS * (HEAD // 4) + tl.arange(0, HEAD // 4)[None, :]
    halves = tl.arange(0, 2 * HEADS)[:, None]
    targets = halves % HEADS * HEAD + halves // HEADS * (HEAD // 2) + tl.arange(0, HEAD // 2)[None, :]
    squares = tl.zeros((4 * HEADS, HEAD // 4), tl.float32)
    for first in tl.static_range(0, WIDTH, STEP):
        at = first + places
        part = tl.load(x + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        squares += part * part
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / WIDTH + eps)
    signs = _signs(x)
    if ROPE:
        half = (row % tokens) * (HEAD // 2) + tl.arange(0, HEAD // 2)
        c = tl.load(cos + half)
        s = tl.load(sin + half)
    coming = tl.load(x + places, mask=places < WIDTH, other=0.0)
    for first in range(0, WIDTH, STEP):
        at = first + places
        given = coming
        coming = tl.load(x + at + STEP, mask=at < WIDTH - STEP, other=0.0)  # 0.31 against 0.36 ms without
        scale = tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        n = given.to(tl.float32) * inverse * scale
        n = tl.permute(tl.reshape(n, (4, HEADS, HEAD // 4)), (1, 0, 2))
        if ROPE:
            n = turned(n, c, s, HEADS, HEAD)
        y = _rotated(n.to(x.dtype.element_ty), signs, HEADS, HEAD)
        to = first + targets
        head = first // HEAD + halves % HEADS
        if CENTER:
            y = y - tl.load(center + to, mask=to < WIDTH, other=0.0)
        y = y * tl.load(factor + head, mask=head * HEAD < WIDTH, other=0.0)
        y = tl.fma(y, 0.0, y)  # NaN for infinity: e4m3 has none, and its largest number would look healthy
        tl.store(out + to, y.to(tl.float8e4nv), mask=to < WIDTH)
