"""Queries and keys in eight bits straight from their norm, for attentions that take them so.

    q8 = e4m3(q·S · by_q)               S: the Hadamard matrix of signs; S/√D is orthogonal, so scores stay
    k8 = e4m3((k·S - center) · by_k)    center: the mean of some keys, times S; softmax does not see it
    q·k - q·mean = (q8·k8) · descale    descale = 1 / (by_q·by_k·D)

    by_q = 448 / (√(D·W) · max|w_q|),  by_k = 448 / (2·√(D·W) · max|w_k|)        of each head

W is the width of all heads and w the weight of the norm. After an RMSNorm a row is no longer than √W before
its weight, and rotations keep lengths: so no number of a head of q·S exceeds √(D·W)·max|w|, whatever the row,
and none of k·S - center twice that. Nothing saturates, and no pass has to look at the numbers first. The
bound is loose, at 40 heads of 128 by a factor of 70, and e4m3 does not mind: it rounds alike over 15 powers
of two. What lies below them is off by 1e-4 of the largest weight, which no score shows.

Why S and the mean: `kernels/attention_quantize.py`. Any center is exact; that of some 500 keys, spread over
all tokens, is within 4 % of a deviation of the mean.
"""

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.kernels.attention_quantize import hadamard, rotated
from runtime.kernels.launch import E4M3, QMAX
from runtime.kernels.rms_rope_quantize import rms_rope_quantize
from runtime.layers.attention import Attend
from runtime.layers.norm import RMSNorm
from runtime.layers.rope import RopeTable

FEWEST = 64  # tokens; fewer fill no tile of such an attention, and are taken as they are
_DISTANCES = (137, 61, 31, 17, 7)  # between keys that are looked at; prime to the width of any picture
_ENOUGH = 512  # keys
_TINY = 1e-12


class Levels(NamedTuple):
    """What the numbers of each head are multiplied by, (H,) fp32 each; see the formulas above."""

    by_q: Tensor
    by_k: Tensor
    descale: Tensor


class QKScales(NamedTuple):
    """What q8 and k8 of a block are, beside their numbers. center: (B, H, D) fp32."""

    levels: Levels
    center: Tensor


MixCompact = Callable[[Tensor, Tensor, Tensor, QKScales], Tensor]
"""softmax(q·kᵀ/√D)·v of q8 (B, L, H, D), k8 (B, S, H, D) and v (B, S, H, D) in 16 bits; S = L.

The result, (B, L, H, D), is in v's memory."""

RunCompact = Callable[[Tensor, Tensor, Tensor, QKScales, float, Tensor | None], Tensor]
"""(q8, k8, v, scales, scale, where the result goes), of one backend (`backends.py`)."""


def compact_of(mix: Attend) -> MixCompact | None:
    """The same attention for compact queries and keys; None where it has no such form."""
    return getattr(mix, "compact", None)


def levels_of(norm_q: Tensor, norm_k: Tensor, num_heads: int) -> Levels:
    """The levels for weights (W,) of the norms of queries and keys."""
    width, top = norm_q.numel(), QMAX[E4M3]
    reach_q, reach_k = (
        sqrt(width * width // num_heads) * weight.float().view(num_heads, -1).abs().amax(1).clamp_min(_TINY)
        for weight in (norm_q, norm_k)
    )
    by_q, by_k = top / reach_q, top / (2 * reach_k)
    return Levels(by_q, by_k, num_heads / (width * by_q * by_k))


class KnownLevels:
    """`levels_of` of two norms, made anew where a weight is another tensor than before."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor, Levels] | None = None

    def of(self, norm_q: Tensor, norm_k: Tensor, num_heads: int) -> Levels:
        """As `levels_of`."""
        if self._known is None or self._known[0] is not norm_q or self._known[1] is not norm_k:
            self._known = norm_q, norm_k, levels_of(norm_q, norm_k, num_heads)
        return self._known[2]


def some_tokens(count: int) -> slice:
    """Which of `count` tokens are looked at for the center of the keys: all of few."""
    step = next((step for step in _DISTANCES if count >= step * _ENOUGH), 1)
    return slice(None, None, step)


def center_of(keys: Tensor) -> Tensor:
    """The mean of keys (B, n, H, D), times S: (B, H, D) fp32."""
    return rotated(keys.mean(1, dtype=torch.float32))


def compact_rows(
    x: Tensor,
    norm: RMSNorm,
    num_heads: int,
    table: RopeTable,
    by: Tensor,
    center: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Heads of norm(x), turned by `table`, in e4m3: x (B, L, H·D) -> (B, L, H, D).

    by (H,), center (B, H, D) or none for queries. `into`, (B, L, H, D) contiguous, is written if given.
    """
    head_dim = x.shape[-1] // num_heads
    if into is None:
        into = torch.empty((*x.shape[:2], num_heads, head_dim), dtype=E4M3, device=x.device)
    turn = table[0][0], table[1][0]  # (L, 1, D/2) each
    for video in range(x.shape[0]):  # each has its own center
        rms_rope_quantize(
            x[video],
            norm.weight,
            norm.eps,
            head_dim,
            by,
            None if center is None else center[video],
            turn,
            into[video].flatten(1),
        )
    return into


def workspace(x: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for queries, keys and values of tokens x (B, L, H·D): (B, L, H, D) each."""
    q, k = torch.empty((2, *x.shape), dtype=E4M3, device=x.device).unflatten(-1, (num_heads, -1)).unbind(0)
    return q, k, torch.empty_like(x).unflatten(-1, (num_heads, -1))


def restored(rows: Tensor, by: Tensor, center: Tensor | None = None) -> Tensor:
    """What compact rows (..., H, D) were, up to their rounding: fp32. center (H, D) or broadcastable."""
    turned = rows.float() / by[:, None]
    if center is not None:
        turned = turned + center
    return turned @ hadamard(rows.shape[-1], rows.device) / rows.shape[-1]


def picked(rows: Tensor, places: Tensor, axis: int) -> Tensor:
    """`index_select` for eight bits too, which torch knows for bytes alone."""
    if rows.dtype != E4M3:
        return rows.index_select(axis, places)
    return rows.view(torch.uint8).index_select(axis, places).view(E4M3)
