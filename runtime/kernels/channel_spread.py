"""Least, largest and mean of each channel over the tokens: what 8-bit copies of q, k and v are scaled by.

x (B, L, H, D) of 16 bits, rows of all heads, whose rows may be apart -> (H, D) fp32 each. One pass: partial
results of 512 rows each, then torch over those; the same bits every time.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.launch import fused, jit, on, tl

_ROWS, _STEPS, _COLUMNS = 16, 32, 128  # a tile, and how many of them below one another


@dataclass(frozen=True)
class Spread:
    """Least, largest and mean of each channel over all rows; each (H, D) fp32."""

    low: Tensor
    high: Tensor
    mean: Tensor


def spread(x: Tensor) -> Spread:
    """Least, largest and mean of each channel of x (B, L, H, D) over batch and tokens."""
    return (spread_triton if fused(x) else spread_torch)(x)


def spread_torch(x: Tensor) -> Spread:
    """The formula in plain torch."""
    rows = x.flatten(0, 1)
    return Spread(rows.amin(0).float(), rows.amax(0).float(), rows.mean(0, dtype=torch.float32))


def spread_triton(x: Tensor) -> Spread:
    """The kernel."""
    rows = rows_of_heads(x)
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


def rows_of_heads(x: Tensor) -> Tensor:
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
