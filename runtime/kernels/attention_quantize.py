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
first finds least, largest and mean of each channel (2 bytes an entry), the second writes (3 bytes); R is made
of signs in registers and multiplied by the tensor cores, exactly. No number leaves the GPU. The copies have
up to 127 rows of zeros behind the last: attention kernels read whole tiles.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from runtime.kernels.launch import E4M3, QMAX, fused, jit, on, tl

_TILE = 128  # rows that attention kernels read at a time, at most
_TINY = 1e-12  # of a bound: keys that are all the same have none
_ROWS, _STEPS, _COLUMNS = 16, 32, 128  # of the first pass: a tile, and how many of them below one another


@dataclass(frozen=True)
class Spread:
    """Least, largest and mean of each channel over all rows; each (H, D) fp32."""

    low: Tensor
    high: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Quantized:
    """What the attention kernel takes, and what makes its output that of q, k and v.

    Attributes:
        q, k, v: (B, L or S, H, D) e4m3. descale: (1,) fp32, what q8·kᵀ8 is to be multiplied by.
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

    Raises ValueError for a D that is no power of two from 16 to 256.
    """
    heads, head_dim = q.shape[2:]
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        raise ValueError(f"heads of {head_dim} cannot be rotated, expected a power of two from 16 to 256")
    of_q, of_k, of_v = spread(q), spread(k), spread(v)
    a, b, descale = shared_scales(
        torch.maximum(of_q.high.abs(), of_q.low.abs()),
        torch.maximum(of_k.high - of_k.mean, of_k.mean - of_k.low),
    )
    reach = torch.maximum(of_v.high - of_v.mean, of_v.mean - of_v.low).clamp_min(_TINY)
    factor = reach / QMAX[E4M3]
    wide = (heads, head_dim)
    return Quantized(
        to_eight_bits(q, torch.zeros_like(of_q.mean), a.reciprocal()[:, None].expand(wide), rotate=True),
        to_eight_bits(k, of_k.mean, b.reciprocal()[:, None].expand(wide), rotate=True),
        to_eight_bits(v, of_v.mean, factor.reciprocal(), rotate=False),
        descale,
        factor,
        of_v.mean,
    )


def shared_scales(q_reach: Tensor, k_reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a (H,), b (H,), c (1,)) fp32 from the largest |q| and |k - mean| of each channel, (H, D) each."""
    bound_q, bound_k = (reach.square().sum(1).sqrt().clamp_min(_TINY) for reach in (q_reach, k_reach))
    c = (bound_q * bound_k).amax(0, keepdim=True) / QMAX[E4M3] ** 2
    return (c * bound_q / bound_k).sqrt(), (c * bound_k / bound_q).sqrt(), c


# --- the first pass ---


def spread(x: Tensor) -> Spread:
    """Least, largest and mean of each channel of x (B, L, H, D) over batch and tokens."""
    return (spread_triton if fused(x) else spread_torch)(x)


def spread_torch(x: Tensor) -> Spread:
    """The formula in plain torch."""
    rows = x.flatten(0, 1)
    return Spread(rows.amin(0).float(), rows.amax(0).float(), rows.mean(0, dtype=torch.float32))


def spread_triton(x: Tensor) -> Spread:
    """The kernel: partial results of 512 rows each, then torch over those; the same bits every time."""
    rows = _rows(x)
    count, width = rows.shape
    chunks = -(-count // (_ROWS * _STEPS))
    parts = torch.empty((3, chunks, width), dtype=torch.float32, device=x.device)
    with on(x):
        _spread_kernel[(chunks, -(-width // _COLUMNS))](
            rows,
            parts,
            count,
            rows.stride(0),
            width,
            ROWS=_ROWS,
            STEPS=_STEPS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
    low, high, total = parts
    return Spread(*(one.view(x.shape[2:]) for one in (low.amin(0), high.amax(0), total.sum(0) / count)))


def _rows(x: Tensor) -> Tensor:
    """x (B, L, H, D) as (B·L, H·D) whose rows may be apart; copied only where its axes do not nest."""
    return x.reshape(-1, x.shape[2] * x.shape[3])


@jit
def _spread_kernel(
    x,
    parts,
    rows,
    stride,
    width,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < width
    low = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    high = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(STEPS):
        row = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & within[None, :]
        y = tl.load(x + row.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
        y = y.to(tl.float32)
        low = tl.minimum(low, tl.where(inside, y, float("inf")))
        high = tl.maximum(high, tl.where(inside, y, float("-inf")))
        total += y
    place = parts + chunk.to(tl.int64) * width + columns
    kind = tl.num_programs(0).to(tl.int64) * width
    tl.store(place, tl.min(low, axis=0), mask=within)
    tl.store(place + kind, tl.max(high, axis=0), mask=within)
    tl.store(place + 2 * kind, tl.sum(total, axis=0), mask=within)


# --- the second pass ---


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
        out[:, :, head] = y.clamp(-QMAX[E4M3], QMAX[E4M3]).to(E4M3)
    return out


def to_eight_bits_triton(x: Tensor, center: Tensor, factor: Tensor, rotate: bool) -> Tensor:
    """The kernel."""
    rows = _rows(x)
    heads, head_dim = x.shape[2:]
    out = _with_tail(x, zeroed=False)
    padded = _whole_tiles(len(rows))
    with on(x):
        _to_eight_bits_kernel[(padded // _TILE, heads)](
            rows,
            out,
            center,
            factor,
            len(rows),
            rows.stride(0),
            WIDTH=heads * head_dim,
            HEAD=head_dim,
            ROWS=_TILE,
            ROTATE=rotate,
            num_warps=8,
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
def _hadamard(SIZE: tl.constexpr, like):
    """(SIZE, SIZE) of 1 and -1 in the dtype of `like`: parity of the ones of i & j."""
    both = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    return (1 - 2 * (both & 1)).to(tl.float32).to(like.dtype)


@jit
def _to_eight_bits_kernel(
    x,
    out,
    center,
    factor,
    rows,
    stride,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * HEAD + tl.arange(0, HEAD)
    inside = (row < rows)[:, None]
    wide = row.to(tl.int64)[:, None]
    given = tl.load(x + wide * stride + columns[None, :], mask=inside, other=0.0)
    if ROTATE:  # noqa: SIM108
        y = tl.dot(given, _hadamard(HEAD, given))  # signs times 16-bit numbers, summed in fp32
    else:
        y = given.to(tl.float32)
    y = (y - tl.load(center + columns)[None, :]) * tl.load(factor + columns)[None, :]
    y = tl.where(inside, y, 0.0)
    tl.store(out + wide * WIDTH + columns[None, :], y.to(tl.float8e4nv))  # the last tile is whole


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
