"""Norms, modulation and gates: computed in fp32 and rounded once, to the dtype of what came in.

Each operation is plain torch, which is the reference and takes gradients, and one fused kernel on a GPU
(`runtime/kernels`) where no gradient is asked for. The kernels may write where their input was, and hand
their result on in the form that its `readers` multiply, the linears it goes to: `Prepared` for 8-bit ones
that agree on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.kernels import gated_add as gated_add_kernel
from runtime.kernels.launch import fused
from runtime.kernels.norm_quantize import Affine, Modulation, Residual, Rms, Scaling, norm, norm_quantize
from runtime.kernels.prepared import Prepared
from runtime.kernels.row_quantize import row_quantize

__all__ = [
    "Affine",
    "Modulation",
    "RMSNorm",
    "Rms",
    "Rows",
    "add_norm",
    "by_kernel",
    "gated_add",
    "norm_of",
    "shared",
    "taken_by",
]

Rows = Tensor | Prepared


def by_kernel(x: Tensor) -> bool:
    """Whether a fused kernel works on x (B, L, D): one video at a time, on a GPU, without gradients."""
    return x.shape[0] == 1 and not torch.is_grad_enabled() and fused(x)


def taken_by(x: Tensor, *readers: nn.Module) -> torch.dtype | None:
    """The 8-bit dtype in which all of `readers` multiply rows like x as they are.

    None where one of them wants x itself, where they do not agree, and where there are none.
    """
    questions = [getattr(reader, "takes", None) for reader in readers]
    dtypes = {None if takes is None else takes(x) for takes in questions}
    return dtypes.pop() if len(dtypes) == 1 else None


def shared(x: Tensor, *readers: nn.Module) -> Rows:
    """x (..., D) as all of `readers` multiply it, made so once; x itself where they do not agree."""
    dtype = taken_by(x, *readers)
    return x if dtype is None else Prepared(*row_quantize(x, dtype), x.dtype)


def norm_of(x: Tensor, scaling: Scaling, eps: float, *readers: nn.Module) -> Rows:
    """LayerNorm(x)·(1 + scale) + shift for a `Modulation`, LayerNorm(x)·weight + bias for an `Affine`.

    RMSNorm(x)·weight for an `Rms`.
    x (B, L, D); shift and scale (B, 1, D) fp32, weight and bias (D,). In x's dtype, or as `readers` take it.
    """
    if by_kernel(x):
        return _by_kernel(x, scaling, eps, readers, None)
    return shared(_plain(x, scaling, eps), *readers)


def add_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, scaling: Scaling, eps: float, *readers: nn.Module
) -> tuple[Tensor, Rows]:
    """(x + branch·gate, `norm_of` that); branch (B, L, D), gate (B, 1, D) fp32 or None for 1.

    A kernel writes the sum to x's own memory.
    """
    if by_kernel(x):
        return x, _by_kernel(x, scaling, eps, readers, Residual(branch, gate))
    x = x + branch if gate is None else gated_add(x, branch, gate)
    return x, norm_of(x, scaling, eps, *readers)


def gated_add(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """residual + branch·gate; residual and branch (B, L, D), gate (B, 1, D) fp32, result as residual.

    A kernel writes it to the residual's own memory.
    """
    if by_kernel(residual):
        return gated_add_kernel.gated_add(residual, branch, gate)
    # The fp32 gate promotes the product and the sum, with no fp32 copy of either operand.
    return (residual + branch * gate).to(residual.dtype)


def _by_kernel(
    x: Tensor, scaling: Scaling, eps: float, readers: tuple[nn.Module, ...], residual: Residual | None
) -> Rows:
    dtype = taken_by(x, *readers)
    if dtype is None:
        return norm(x, scaling, eps, residual)
    return Prepared(*norm_quantize(x, scaling, eps, dtype, residual), x.dtype)


def _plain(x: Tensor, scaling: Scaling, eps: float) -> Tensor:
    if isinstance(scaling, Rms):
        return F.rms_norm(x.float(), x.shape[-1:], scaling.weight.float(), eps).to(x.dtype)
    if isinstance(scaling, Affine):
        return _layer_norm_fp32(x, eps, scaling.weight, scaling.bias).to(x.dtype)
    return (_layer_norm_fp32(x, eps) * (1 + scaling.scale) + scaling.shift).to(x.dtype)


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

    @property
    def scaling(self) -> Rms:
        """As `norm_of` takes it."""
        return Rms(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return _plain(x, self.scaling, self.eps)
