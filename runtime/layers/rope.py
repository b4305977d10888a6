"""Rotary positions on a (frames, rows, columns) grid.

A head of width d is d/2 pairs of neighbouring numbers; each pair is a complex number that is turned by an
angle. The pairs are shared out between the three axes, and pair j of an axis that owns n numbers turns by
position · 10000^(-2j/n). Positions count patches from 0. Every head uses the same table.
"""

from functools import lru_cache

import torch
from torch import Tensor

from runtime.kernels.rms_rope import rms_rope
from runtime.layers.norm import RMSNorm, by_kernel

MAX_POSITIONS = 1024  # an axis longer than this was never trained, so it is refused

RopeTable = tuple[Tensor, Tensor]  # cosines and sines, each (1, L, 1, D/2) fp32


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's numbers turn with the frame, the row and the column: 44, 42, 42 of 128."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_table(grid: tuple[int, int, int], head_dim: int, like: Tensor) -> RopeTable:
    """The cosines and sines of every patch of `grid`, frames slowest and columns fastest.

    grid: (frames, rows, columns) in patches, each 1..1024. head_dim: even. like: any tensor that lives where
    the table is wanted. Returns two fp32 tensors (1, L, 1, head_dim/2), L = frames·rows·columns.
    The last two grids are kept: 2·L·head_dim bytes for each fp32 table, 8.4 MB for 832x480x81.
    Raises ValueError for an axis that is outside 1..1024 or an odd head_dim.
    """
    for axis, length in zip(("frame", "row", "column"), grid, strict=True):
        if not 1 <= length <= MAX_POSITIONS:
            raise ValueError(
                f"the {axis} axis has {length} patches, but rotary positions cover 1 to {MAX_POSITIONS}"
            )
    if head_dim % 2:
        raise ValueError(f"head width {head_dim} is odd, but rotary positions turn pairs of numbers")
    return _table(grid, head_dim, like.device)


@lru_cache(maxsize=2)
def _table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> RopeTable:
    # A table that inference made must also serve a later training step, which inference tensors may not.
    with torch.inference_mode(False):
        angles = []
        for axis, (length, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
            exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / max(width, 1)
            positions = torch.arange(length, dtype=torch.float64, device="cpu")
            shape = [1, 1, 1, width // 2]
            shape[axis] = length
            angles.append(torch.outer(positions, 10000.0**-exponents).view(shape))
        # float64 up to the cosine: at position 1000 an fp32 angle would already be off by 3e-5.
        cos, sin = (
            torch.cat([table.float().to(device).expand(*grid, -1) for table in tables], dim=-1)
            for tables in ([a.cos() for a in angles], [a.sin() for a in angles])
        )
        return cos.view(1, -1, 1, head_dim // 2), sin.view(1, -1, 1, head_dim // 2)


def norm_rope(
    x: Tensor, norm: RMSNorm, num_heads: int, table: RopeTable | None = None, into: Tensor | None = None
) -> Tensor:
    """Heads of norm(x), turned by `table` if there is one: x (B, L, H·D) -> (B, L, H, D).

    A kernel does both at once, with one rounding, in x's own memory or in `into`, (B, L, H, D) contiguous.
    """
    if by_kernel(x):
        turn = None if table is None else (table[0][0], table[1][0])  # (L, 1, D/2) each
        place = None if into is None else into.flatten(2)
        x = rms_rope(x, norm.weight, norm.eps, x.shape[-1] // num_heads, turn, place)
        return x.unflatten(-1, (num_heads, -1))
    heads = norm(x).unflatten(-1, (num_heads, -1))
    return heads if table is None else apply_rope(heads, table)


def apply_rope(x: Tensor, table: RopeTable) -> Tensor:
    """Turn the pairs of x (B, L, H, D) by `table`, in fp32, rounded once to x's dtype."""
    cos, sin = table
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, H, D/2)
    # The fp32 table promotes each product; rounding the halves before they are joined halves the peak.
    turned = (real * cos - imaginary * sin).to(x.dtype), (real * sin + imaginary * cos).to(x.dtype)
    return torch.stack(turned, dim=-1).flatten(-2)  # (B, L, H, D)
