"""Norms, modulation and gates: computed in fp32 and rounded once, to the dtype of what came in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """(x - mean)/√(variance + eps), times weight, plus bias, over the last axis; x (..., D), result as x."""
    return _layer_norm_fp32(x, eps, weight, bias).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift; x (B, L, D), shift and scale (B, 1, D) fp32, result as x."""
    return (_layer_norm_fp32(x, eps) * (1 + scale) + shift).to(x.dtype)


def gated_add(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """residual + branch·gate; residual and branch (B, L, D), gate (B, 1, D) fp32, result as residual."""
    # The fp32 gate promotes the product and the sum, with no fp32 copy of either operand.
    return (residual + branch * gate).to(residual.dtype)


def _layer_norm_fp32(
    x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


class RMSNorm(nn.Module):
    """x/√(mean(x²) + eps)·weight over the last axis; x (..., dim), result as x."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
