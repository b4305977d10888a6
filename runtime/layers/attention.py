"""Attention: one function, which is all that the models know of it."""

import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(q·kᵀ·scale + bias)·v over all keys, with the softmax in fp32.

    q (B, L, H, D), k and v (B, S, H, D), of one dtype. scale: 1/√D unless given. bias: added to the scores,
    broadcastable to (B, H, L, S), in q's dtype. Returns (B, L, H·D) in q's dtype.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, L, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).flatten(2)  # (B, L, H·D)
