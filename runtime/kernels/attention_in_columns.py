"""Attention on the 8-bit copies of `attention_quantize.quantize_by_sample`, in plain torch on any machine.

    w = exp(s - max s),  s = q8·kᵀ8·descale·scale           fp32; the sum t of w is that of these
    out = (Σ e4m3(256·w)/256·v8) / t · factor + center

The twin of `hopper_attention.py`, which cannot be imported without Gluon. There the maximum is of the keys so
far, so that weights are rounded in other units.
"""

import torch
from torch import Tensor

from runtime.kernels.attention_quantize import slots
from runtime.kernels.launch import E4M3

WEIGHT_SCALE = 256.0  # the largest weight in e4m3, whose top is 448
_SCORES = 2**26  # at a time


def attend_torch(
    q8: Tensor, k8: Tensor, columns: Tensor, descale: Tensor, factor: Tensor, center: Tensor, scale: float
) -> Tensor:
    """The formula in plain torch, head by head.

    q8 (L, H, D), k8 (S, H, D) and columns (H·D, S rounded up to 128) e4m3; descale (H,), factor and center
    (H, D) fp32. Returns (L, H, D) fp32.
    """
    out = torch.empty(q8.shape, dtype=torch.float32, device=q8.device)
    step = max(_SCORES // len(k8), 1)
    values_of = torch.empty((q8.shape[1], columns.shape[1], q8.shape[2]), device=q8.device)  # (H, S', D)
    values_of[:, slots(columns.shape[1], q8.device)] = columns.view(*values_of.mT.shape).mT.float()
    for head in range(q8.shape[1]):
        keys, values = k8[:, head].float().t(), values_of[head, : len(k8)]  # (D, S), (S, D)
        for start in range(0, len(q8), step):
            s = q8[start : start + step, head].float() @ keys * (descale[head] * scale)  # (step, S)
            w = (s - s.amax(1, keepdim=True)).exp()
            w8 = (w * WEIGHT_SCALE).to(E4M3).float() / WEIGHT_SCALE
            out[start : start + step, head] = w8 @ values / w.sum(1, keepdim=True)
    return out * factor + center
