"""Attention in eight bits by our own kernel for Hopper (`kernels/hopper_attention.py`).

    out = softmax(q8·kᵀ8·c)·v8·s + m           q8, k8, v8 in e4m3 as kernels/attention_quantize.py makes them

- Scales come from a sample of the rows, one for each head of q and k and one for each channel of v. Or q and
  k come in e4m3 already, straight from their norm (`compact_qk.py`): so the model's blocks call it.
- The output is in 16 bits and final: no pass follows. It may take the memory of q, so that beside q, k and v
  there are 8-bit copies of the three alone; of compact q and k that of v.
- Sums over the keys are fp32 beyond a tile of 128, where cuDNN's FP8 loses up to 29 % in 32,760 keys.
- Fewer than 64 tokens or keys fill no tile: torch computes them, in 16 bits.
- Nothing waits for the GPU, and everything runs on torch's current stream.
"""

import importlib
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.attention_quantize import quantize_by_sample, values_by_sample
from runtime.kernels.launch import INTERPRETED
from runtime.layers.attention import Run, attend
from runtime.layers.compact_qk import QKScales

SHORTEST = 64


def find(capability: tuple[int, int]) -> Run | None:
    """What computes attention so; None but for Hopper, and where Triton has no Gluon as the kernel needs."""
    return run if capability == (9, 0) and _kernel() is not None else None


def _kernel() -> Any:
    """The module of the kernel; None where Triton is missing, too old or an interpreter."""
    if INTERPRETED:
        return None
    # Gluon is young: a version that moved a name, or that has no number, is as good as none.
    with suppress(ImportError, AttributeError, ValueError):
        return importlib.import_module("runtime.kernels.hopper_attention")
    return None


def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale)·v; q (B, L, H, 128), k and v (B, S, H, 128) of one 16-bit dtype on one GPU.

    Returns (B, L, H, 128) in q's dtype. Raises ValueError for heads of another size.
    """
    if min(q.shape[1], k.shape[1]) < SHORTEST:
        return attend(q, k, v, scale)
    return _into(torch.empty(q.shape, dtype=q.dtype, device=q.device), q, k, v, scale)


def run_over(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`run` for whoever needs q no more: the result takes its memory, which spares a copy of all tokens."""
    if min(q.shape[1], k.shape[1]) < SHORTEST or not q.is_contiguous():
        return run(q, k, v, scale)
    return _into(q, q, k, v, scale)


def _into(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    kernel = _kernel()
    for batch in range(q.shape[0]):
        of = slice(batch, batch + 1)
        given = quantize_by_sample(q[of], k[of], v[of])
        kernel.attend(
            given.q[0], given.k[0], given.v, given.descale, given.factor, given.center, scale, out[batch]
        )
    return out


def run_compact(
    q8: Tensor, k8: Tensor, v: Tensor, scales: QKScales, scale: float, out: Tensor | None = None
) -> Tensor:
    """softmax(q·kᵀ·scale)·v of compact q8 (B, L, H, 128) and k8, and v (B, S, H, 128) of 16 bits.

    Returns `out`, (B, L, H, 128) in v's dtype, which may be v; new memory unless given. Raises ValueError as
    `run`.
    """
    out = torch.empty(q8.shape, dtype=v.dtype, device=v.device) if out is None else out
    for video in range(q8.shape[0]):
        columns, factor, center = values_by_sample(v[video : video + 1])
        descale = scales.levels.descale
        _kernel().attend(q8[video], k8[video], columns, descale, factor, center, scale, out[video])
    return out
