"""Attention: one function, which is all that the models know of it."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(q·kᵀ/√D)·v: q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D), `attend` or what equals it.

It may leave its result in q's memory; k and v stay as they are."""

Run = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q, k, v, scale), softmax(q·kᵀ·scale)·v: one backend (`backends.py`), which leaves q as it is too."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """`attend` with the heads of each token side by side: (B, L, H·D)."""
    return attend(q, k, v, scale, bias).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ·scale + bias)·v over all keys, with the softmax in fp32.

    q (B, L, H, D), k and v (B, S, H, D), of one dtype. scale: 1/√D unless given. bias: added to the scores,
    broadcastable to (B, H, L, S), in q's dtype. Returns (B, L, H, D) in q's dtype; some kernels write heads
    slowest, so whoever flattens it may copy it, and does better slice by slice.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, L, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)
