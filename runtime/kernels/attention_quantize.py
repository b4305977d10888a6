"""q, k and v to e4m3 for an attention in eight bits, and its output back.

    q8 = e4m3((q·R) / a)                  R = Hadamard / √D, orthogonal: the scores stay what they are
    k8 = e4m3(((k - mean(k))·R) / b)      the mean over the keys: softmax does not see it
    v8 = e4m3((v - m) / s)                m, s (H, D): mean and half-range over the keys
    q·k - mean(k)·q = (q8·k8)·c           a·b = c in every head: the attention kernel takes one number
    out = softmax(...)·v8·s + m           the weights of a query sum to 1

Eight-bit floats round to 1 part in 16 of the number itself, whatever the scale is: what a scale can do is
keep numbers in range, and what keeps the error small is that no number is much larger than its neighbours. A
common mean and a few large channels are what the model's q and k have: the mean goes, and R spreads a large
channel over its head, so that its rounding no longer drowns the rest (QuaRot, arXiv 2404.00456;
FlashAttention 3, arXiv 2407.08608). With m apart, neither the rounding of the output nor weights that are too
small for eight bits touch the mean.

    a = sqrt(c·Q/K), b = sqrt(c·K/Q), c = max over heads of Q·K / 448²
    Q² = Σ_d max_l |q[l,d]|², K² = Σ_d max_l |k[l,d] - mean[d]|²               (H,); |x·R| <= |x|

x (B, L, H, D), rows of all heads, 16 bits; 8-bit copies (B, L, H, D). Two passes over each of q, k, v: the
first (`channel_spread`) reads 2 bytes an entry, the second writes (3 bytes with its reading); R is made
of signs in registers and multiplied by the tensor cores, exactly. No number leaves the GPU. The copies have
up to 127 rows of zeros behind the last: attention kernels read whole tiles.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from runtime.kernels.channel_spread import rows_of_heads, spread
from runtime.kernels.launch import E4M3, QMAX, fused, jit, on, tl

_TILE = 128  # rows that attention kernels read at a time, at most
_TINY = 1e-12  # of a bound: keys that are all the same have none
_TURNS = 8  # tiles that one program rotates: it makes R once
# `quantize_by_sample` looks at one row in 17, or at so many. A picture is 52 or 80 tokens wide: one row in 16
# would leave most columns of the picture out.
_EVERY, _ENOUGH = 17, 1024
_ROOM = 8.0  # times the reach of the rows looked at fits the range


@dataclass(frozen=True)
class Quantized:
    """What the attention kernel takes, and what makes its output that of q, k and v.

    Attributes:
        q, k, v: (B, L or S, H, D) e4m3; v as `to_columns` lays it out where `quantize_by_sample` made it.
        descale: (1,) fp32, or one for each head, (H,): what q8·kᵀ8 is to be multiplied by.
        factor, center: (H, D) fp32, for `restore`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    descale: Tensor
    factor: Tensor
    center: Tensor


def quantize(q: Tensor, k: Tensor, v: Tensor) -> Quantized:
    """q (B, L, H, D), k and v (B, S, H, D) of one 16-bit dtype in eight bits, as this file's formulas say.

    Raises ValueError for a D that is no power of two from 16 to 128.
    """
    check_head_dim(q.shape[3])
    of_q, of_k, of_v = spread(q), spread(k), spread(v)
    a, b, descale = shared_scales(
        torch.maximum(of_q.high.abs(), of_q.low.abs()),
        torch.maximum(of_k.high - of_k.mean, of_k.mean - of_k.low),
    )
    reach = torch.maximum(of_v.high - of_v.mean, of_v.mean - of_v.low).clamp_min(_TINY)
    factor = reach / QMAX[E4M3]
    wide = of_q.mean.shape
    return Quantized(
        to_eight_bits(q, torch.zeros_like(of_q.mean), a.reciprocal()[:, None].expand(wide), rotate=True),
        to_eight_bits(k, of_k.mean, b.reciprocal()[:, None].expand(wide), rotate=True),
        to_eight_bits(v, of_v.mean, factor.reciprocal(), rotate=False),
        descale,
        factor,
        of_v.mean,
    )


def quantize_by_sample(q: Tensor, k: Tensor, v: Tensor) -> Quantized:
    """The same for a kernel that takes a scale for each head, v in columns, and that writes 16 bits.

    q (1, L, H, D), k and v (1, S, H, D) of one 16-bit dtype. Its scales are no tight ones, which spares most
    of the first pass: e4m3 has 15 powers of two in which the rounding is the same, so that a scale may leave
    room. Any m is exact. One row in 17 is looked at; what reaches 8 times as far as they do still fits, and
    what reaches farther becomes the largest number. Raises as `quantize`.
    """
    check_head_dim(q.shape[3])
    of_q, of_k = (spread(_sample(x)) for x in (q, k))
    a, b = (
        reach.square().sum(1, keepdim=True).sqrt().clamp_min(_TINY) * (_ROOM / QMAX[E4M3])  # (H, 1)
        for reach in (
            torch.maximum(of_q.high.abs(), of_q.low.abs()),
            torch.maximum(of_k.high - of_k.mean, of_k.mean - of_k.low),
        )
    )
    wide = of_q.mean.shape
    columns, factor, center = values_by_sample(v)
    return Quantized(
        to_eight_bits(q, torch.zeros_like(of_q.mean), a.reciprocal().expand(wide), rotate=True),
        to_eight_bits(k, of_k.mean, b.reciprocal().expand(wide), rotate=True),
        columns,
        (a * b).flatten(),
        factor,
        center,
    )


def values_by_sample(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v (1, S, H, D) as `quantize_by_sample` has it: in columns, its factor and its center, (H, D) each."""
    found = spread(_sample(v))
    reach = torch.maximum(found.high - found.mean, found.mean - found.low).clamp_min(_TINY)
    factor = reach * (_ROOM / QMAX[E4M3])
    return to_columns(v, found.mean, factor.reciprocal()), factor, found.mean


def _sample(x: Tensor) -> Tensor:
    """Rows of x (B, L, H, D) at equal distances: all of few, one in 17 of many."""
    return x[:, :: max(min(_EVERY, x.shape[1] // _ENOUGH), 1)]


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError for a size that has no Hadamard matrix here, or no kernel."""
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 128:
        raise ValueError(f"heads of {head_dim} cannot be rotated, expected a power of two from 16 to 128")


def shared_scales(q_reach: Tensor, k_reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a (H,), b (H,), c (1,)) fp32 from the largest |q| and |k - mean| of each channel, (H, D) each."""
    bound_q, bound_k = (reach.square().sum(1).sqrt().clamp_min(_TINY) for reach in (q_reach, k_reach))
    c = (bound_q * bound_k).amax(0, keepdim=True) / QMAX[E4M3] ** 2
    return (c * bound_q / bound_k).sqrt(), (c * bound_k / bound_q).sqrt(), c


# --- to eight bits ---


def to_eight_bits(x: Tensor, center: Tensor, factor: Tensor, rotate: bool) -> Tensor:
    """e4m3 of (x - center)·R·factor, R the rotation or 1. x (B, L, H, D), center and factor (H, D) fp32.

    Returns (B, L, H, D), with rows of zeros behind it up to a whole number of tiles.
    """
    center = rotated(center) if rotate else center
    factor = factor * x.shape[-1] ** -0.5 if rotate else factor  # R without its root is of signs alone
    run = to_eight_bits_triton if fused(x, E4M3) else to_eight_bits_torch
    return run(x, center.contiguous(), factor.contiguous(), rotate)


def rotated(x: Tensor) -> Tensor:
    """x (..., D) times the Hadamard matrix, whose entries are 1 and -1."""
    return x.float() @ hadamard(x.shape[-1], x.device)


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The Hadamard matrix (size, size) fp32: entry (i, j) is -1 where i & j has an odd number of ones."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device)


def to_eight_bits_torch(x: Tensor, center: Tensor, factor: Tensor, rotate: bool) -> Tensor:
    """The formula in plain torch, a head at a time: a whole copy in fp32 would not fit beside the model."""
    out = _with_tail(x)
    for head in range(x.shape[2]):
        y = rotated(x[:, :, head]) if rotate else x[:, :, head].float()
        y = (y - center[head]) * factor[head]
        y += y - y  # NaN for infinity: e4m3 has none, and its largest number would look healthy
        out[:, :, head] = y.clamp(-QMAX[E4M3], QMAX[E4M3]).to(E4M3)
    return out


def to_eight_bits_triton(x: Tensor, center: Tensor, factor: Tensor, rotate: bool) -> Tensor:
    """The kernel."""
    rows = rows_of_heads(x)
    heads, head_dim = x.shape[2:]
    out = _with_tail(x, zeroed=False)
    padded = _whole_tiles(len(rows))
    with on(x):
        _to_eight_bits_kernel[(-(-padded // (_TILE * _TURNS)), heads)](
            rows,
            out,
            center,
            factor,
            len(rows),
            padded,
            rows.stride(0),
            WIDTH=heads * head_dim,
            HEAD=head_dim,
            ROWS=_TILE,
            TURNS=_TURNS,
            ROTATE=rotate,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=False,
        )
    return out


def _whole_tiles(rows: int) -> int:
    return -(-rows // _TILE) * _TILE


def _with_tail(x: Tensor, zeroed: bool = True) -> Tensor:
    """Room for x's numbers in e4m3, and for rows behind them that fill the last tile."""
    batch, length, heads, head_dim = x.shape
    rows = batch * length
    room = torch.empty((_whole_tiles(rows), heads, head_dim), dtype=E4M3, device=x.device)
    if zeroed:
        room[rows:].view(torch.uint8).zero_()
    return room[:rows].view(x.shape)


@jit
def signs_of(both, like):
    """1 and -1 in the dtype that `like` points to: -1 where `both`, 0 to 255, has an odd number of ones."""
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    return (1 - 2 * (both & 1)).to(tl.float32).to(like.dtype.element_ty)


@jit
def _nan_for_infinity(y):
    """y, where it is finite: e4m3 has no infinity, and its largest number would look healthy."""
    return y + (y - y)


@jit
def _to_eight_bits_kernel(
    x,
    out,
    center,
    factor,
    rows,
    padded,
    stride,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    columns = tl.program_id(1) * HEAD + tl.arange(0, HEAD)
    middle = tl.load(center + columns)[None, :]
    by = tl.load(factor + columns)[None, :]
    if ROTATE:
        signs = signs_of(tl.arange(0, HEAD)[:, None] & tl.arange(0, HEAD)[None, :], x)
    for turn in range(TURNS):
        row = (tl.program_id(0) * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        wide = row.to(tl.int64)[:, None]
        given = tl.load(x + wide * stride + columns[None, :], mask=inside, other=0.0)
        if ROTATE:  # noqa: SIM108
            y = tl.dot(given, signs)  # signs times 16-bit numbers, summed in fp32
        else:
            y = given.to(tl.float32)
        y = tl.where(inside, _nan_for_infinity((y - middle) * by), 0.0)
        tl.store(out + wide * WIDTH + columns[None, :], y.to(tl.float8e4nv), mask=(row < padded)[:, None])


# --- values in columns ---


def slots(count: int, device: torch.device) -> Tensor:
    """Which key stands in each slot of `to_columns`, (count,) int64; count a multiple of 16.

    Of 16 keys c·8 + j·2 + b, the slot of each is j·4 + c·2 + b: a thread of a warp group has the scores of
    keys j·2 and j·2 + 1 of each eight in its registers after one product, and gives four numbers side by
    side, those of slots j·4 to j·4 + 3, to the next (PTX ISA, fragments of wgmma.m64nNk32).
    """
    return torch.arange(count, device=device).view(-1, 2, 4, 2).transpose(1, 2).flatten()


def to_columns(x: Tensor, center: Tensor, factor: Tensor) -> Tensor:
    """e4m3 of (x - center)·factor with the keys of a channel side by side, in `slots`.

    x (1, S, H, D); center and factor (H, D) fp32. Returns (H·D, S rounded up to 128), zeros behind the last.
    Raises ValueError for more than one batch.
    """
    if x.shape[0] != 1:
        raise ValueError(f"{x.shape[0]} batches side by side are no columns, expected 1")
    run = to_columns_triton if fused(x, E4M3) else to_columns_torch
    return run(x, center.contiguous(), factor.contiguous())


def to_columns_torch(x: Tensor, center: Tensor, factor: Tensor) -> Tensor:
    """The formula in plain torch, a head at a time."""
    _, length, heads, head_dim = x.shape
    out = torch.zeros((heads, head_dim, _whole_tiles(length)), dtype=E4M3, device=x.device)
    order = slots(out.shape[2], x.device)
    for head in range(heads):
        y = torch.zeros((out.shape[2], head_dim), device=x.device)
        y[:length] = (x[0, :, head].float() - center[head]) * factor[head]
        y += y - y
        out[head] = y[order].clamp(-QMAX[E4M3], QMAX[E4M3]).to(E4M3).t()
    return out.flatten(0, 1)


def to_columns_triton(x: Tensor, center: Tensor, factor: Tensor) -> Tensor:
    """The kernel."""
    rows = rows_of_heads(x)
    heads, head_dim = x.shape[2:]
    padded = _whole_tiles(len(rows))
    out = torch.empty((heads * head_dim, padded), dtype=E4M3, device=x.device)
    with on(x):
        _to_columns_kernel[(padded // _TILE, heads)](
            rows,
            out,
            center,
            factor,
            len(rows),
            rows.stride(0),
            padded,
            HEAD=head_dim,
            ROWS=_TILE,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return out


@jit
def _to_columns_kernel(x, out, center, factor, rows, stride, padded, HEAD: tl.constexpr, ROWS: tl.constexpr):
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = slot // 16 * 16 + slot // 2 % 2 * 8 + slot // 4 % 4 * 2 + slot % 2
    columns = tl.program_id(1) * HEAD + tl.arange(0, HEAD)
    inside = (row < rows)[:, None]
    given = tl.load(x + row.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    y = given.to(tl.float32) - tl.load(center + columns)[None, :]
    y = tl.where(inside, _nan_for_infinity(y * tl.load(factor + columns)[None, :]), 0.0)
    place = out + columns.to(tl.int64)[:, None] * padded + slot[None, :]
    tl.store(place, tl.trans(y.to(tl.float8e4nv)))  # the last tile is whole


# --- and back ---


def restore(
    out: Tensor, factor: Tensor, center: Tensor, dtype: torch.dtype, into: Tensor | None = None
) -> Tensor:
    """out·factor + center in fp32, then to dtype; in place where `out` has that dtype already.

    out (B, L, H, D), e4m3 or 16 bits; factor and center (H, D) fp32. into: where the result goes otherwise,
    (B, L, H, D) of dtype, contiguous; new memory unless given.
    """
    return (restore_triton if fused(out, out.dtype) else restore_torch)(out, factor, center, dtype, into)


def restore_torch(
    out: Tensor, factor: Tensor, center: Tensor, dtype: torch.dtype, into: Tensor | None = None
) -> Tensor:
    """The formula in plain torch, a head at a time."""
    result = _place_for(out, dtype, into)
    for head in range(out.shape[2]):
        result[:, :, head] = out[:, :, head].float() * factor[head] + center[head]
    return result


def _place_for(out: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor:
    if out.dtype == dtype:
        return out
    return torch.empty_like(out, dtype=dtype) if into is None else into


def restore_triton(
    out: Tensor, factor: Tensor, center: Tensor, dtype: torch.dtype, into: Tensor | None = None
) -> Tensor:
    """The kernel."""
    result = _place_for(out, dtype, into)
    width = out.shape[2] * out.shape[3]
    rows, columns = 8, 512
    count = out.numel() // width
    with on(out):
        _restore_kernel[(-(-count // rows), -(-width // columns))](
            out.view(-1, width),
            result.view(-1, width),
            factor.contiguous(),
            center.contiguous(),
            count,
            WIDTH=width,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return result


@jit
def _restore_kernel(
    out, result, factor, center, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < WIDTH
    places = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    inside = (rows < count)[:, None] & within[None, :]
    scale = tl.load(factor + columns, mask=within, other=0.0)[None, :]
    added = tl.load(center + columns, mask=within, other=0.0)[None, :]
    y = tl.load(out + places, mask=inside, other=0.0).to(tl.float32) * scale + added
    tl.store(result + places, y.to(result.dtype.element_ty), mask=inside)
