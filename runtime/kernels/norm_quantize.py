"""LayerNorm with its modulation or weight, and what stands before and after it, in one pass over the tokens.

    x <- round(x + branch * gate)                             only with a branch; in place; gate None is 1
    n  = (x - mean(x)) / sqrt(var(x) + eps)                   fp32, over the row
    y  = round(n * (1 + scale) + shift)                       `Modulation`, or
    y  = round(n * weight + bias)                             `Affine`
    s  = max(absmax(y), 1e-30) / qmax,  q = round(y / s)      `norm_quantize`; `norm` returns y

round: to x's dtype; q: to nearest, ties to even (row_quantize.py). y is rounded before it is quantized
because the unfused path does so, and both must choose the same levels.

x and branch (..., D) bf16, fp16 or fp32, contiguous; scale, shift, gate, weight and bias D numbers each.
One program holds one row in registers: with a branch and int8 out 7 bytes for each bf16 entry, against 17
unfused. The residual stream x equals the twin's bit for bit; y may differ by one rounding, because sums run
in another order.
"""

# mypy: allow-untyped-defs
# (Triton reads the signatures of its kernels itself: annotations there are its own.)

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.launch import fused, jit, on, row_parts, row_vector, rows_of, tl, warps_for
from runtime.kernels.row_quantize import row_quantize_torch
from runtime.kernels.rows import absmax_bits, quantized, row_scale


class Modulation(NamedTuple):
    """n·(1 + scale) + shift, for a norm that the time modulates; D fp32 numbers each."""

    shift: Tensor
    scale: Tensor


class Affine(NamedTuple):
    """n·weight + bias, for a norm with parameters of its own; D numbers each."""

    weight: Tensor
    bias: Tensor


class Residual(NamedTuple):
    """What is added to x first: branch (..., D) like x, times gate (D fp32 numbers; None is 1)."""

    branch: Tensor
    gate: Tensor | None = None


Scaling = Modulation | Affine


def norm_quantize(
    x: Tensor, scaling: Scaling, eps: float, dtype: torch.dtype, residual: Residual | None = None
) -> tuple[Tensor, Tensor]:
    """x (..., D) -> (q (..., D) of dtype, s (..., 1) fp32); with `residual`, x is changed in place first.

    dtype: torch.int8 or torch.float8_e4m3fn. Raises ValueError for rows that are not contiguous or sizes that
    do not agree.
    """
    run = norm_quantize_triton if fused(x, dtype) else norm_quantize_torch
    return run(x, scaling, eps, dtype, residual)


def norm(x: Tensor, scaling: Scaling, eps: float, residual: Residual | None = None) -> Tensor:
    """As `norm_quantize`, without quantizing: y (..., D) in x's dtype."""
    return (norm_triton if fused(x) else norm_torch)(x, scaling, eps, residual)


def norm_torch(x: Tensor, scaling: Scaling, eps: float, residual: Residual | None = None) -> Tensor:
    """The formula in plain torch."""
    if residual is not None:
        branch, gate = residual
        x.copy_(x + branch if gate is None else x + branch * gate.reshape(-1))
    width = x.shape[-1:]
    if isinstance(scaling, Affine):
        weight, bias = (part.reshape(-1).float() for part in scaling)
        return F.layer_norm(x.float(), width, weight, bias, eps).to(x.dtype)
    shift, scale = (part.reshape(-1) for part in scaling)
    return (F.layer_norm(x.float(), width, None, None, eps) * (1 + scale) + shift).to(x.dtype)


def norm_quantize_torch(
    x: Tensor, scaling: Scaling, eps: float, dtype: torch.dtype, residual: Residual | None = None
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch."""
    return row_quantize_torch(norm_torch(x, scaling, eps, residual), dtype)


def norm_triton(
    x: Tensor, scaling: Scaling, eps: float, residual: Residual | None = None, warps: int = 0
) -> Tensor:
    """The kernel; `warps` 0 takes the number that suits D."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, scaling, eps, residual, y, None, warps)
    return y


def norm_quantize_triton(
    x: Tensor,
    scaling: Scaling,
    eps: float,
    dtype: torch.dtype,
    residual: Residual | None = None,
    warps: int = 0,
) -> tuple[Tensor, Tensor]:
    """The kernel; `warps` 0 takes the number that suits D."""
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    row_scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _launch(x, scaling, eps, residual, q, row_scales, warps)
    return q, row_scales


def _launch(
    x: Tensor,
    scaling: Scaling,
    eps: float,
    residual: Residual | None,
    out: Tensor,
    row_scales: Tensor | None,
    warps: int,
) -> None:
    rows = rows_of(x)
    count, width = rows.shape
    branch, gate = residual if residual is not None else (None, None)
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected that of x, {tuple(x.shape)}")
    modulated = isinstance(scaling, Modulation)
    factor, addend = (scaling.scale, scaling.shift) if isinstance(scaling, Modulation) else scaling
    main, tail = row_parts(width)
    if not count:
        return
    with on(x):
        _norm_kernel[(count,)](
            rows,
            rows if branch is None else rows_of(branch.contiguous(), "branch"),
            rows if gate is None else row_vector(gate, width, "gate"),
            row_vector(factor, width, "scale" if modulated else "weight"),
            row_vector(addend, width, "shift" if modulated else "bias"),
            out,
            rows if row_scales is None else row_scales,
            eps,
            WIDTH=width,
            MAIN=main,
            TAIL=tail,
            RESIDUAL=branch is not None,
            GATED=gate is not None,
            MODULATED=modulated,
            QUANTIZE=row_scales is not None,
            INTEGER=out.dtype == torch.int8,
            num_warps=warps or warps_for(width),
            enable_fp_fusion=False,
        )


@jit
def _take(x, branch, gate, places, inside, RESIDUAL: tl.constexpr, GATED: tl.constexpr):
    """Part of the row in fp32, after the residual, which is stored."""
    value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(branch + places, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            added = added * tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
        rounded = (value + added).to(x.dtype.element_ty)
        tl.store(x + places, rounded, mask=inside)
        value = rounded.to(tl.float32)
    return value


@jit
def _scaled(centred, inverse, factor, addend, places, inside, ROUND: tl.constexpr, MODULATED: tl.constexpr):
    """Part of y, rounded to the dtype ROUND, in fp32; 0 outside."""
    multiplier = tl.load(factor + places, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        multiplier = 1.0 + multiplier
    plus = tl.load(addend + places, mask=inside, other=0.0).to(tl.float32)
    return tl.fma(centred * inverse, multiplier, plus).to(ROUND).to(tl.float32)


@jit
def _norm_kernel(
    x,
    branch,
    gate,
    factor,
    addend,
    out,
    scales,
    eps,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    MODULATED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * WIDTH
    branch += row * WIDTH
    out += row * WIDTH
    ROUND: tl.constexpr = x.dtype.element_ty
    places = tl.arange(0, MAIN)
    whole = places < WIDTH
    a = _take(x, branch, gate, places, whole, RESIDUAL, GATED)
    total = tl.sum(a, axis=0)
    if TAIL:
        beyond = MAIN + tl.arange(0, TAIL)
        inside = beyond < WIDTH
        b = _take(x, branch, gate, beyond, inside, RESIDUAL, GATED)
        total += tl.sum(b, axis=0)
    mean = total / WIDTH
    a = a - mean
    squares = tl.sum(a * a, axis=0)
    if TAIL:
        b = tl.where(inside, b - mean, 0.0)
        squares += tl.sum(b * b, axis=0)
    inverse = 1.0 / tl.sqrt(squares / WIDTH + eps)
    a = _scaled(a, inverse, factor, addend, places, whole, ROUND, MODULATED)
    if TAIL:
        b = _scaled(b, inverse, factor, addend, beyond, inside, ROUND, MODULATED)
    if QUANTIZE:
        bits = absmax_bits(a)
        if TAIL:
            bits = tl.maximum(bits, absmax_bits(b))
        scale, reciprocal, stored = row_scale(bits, INTEGER)
        tl.store(scales + row, stored)
        tl.store(out + places, quantized(a, scale, reciprocal, INTEGER))
        if TAIL:
            tl.store(out + beyond, quantized(b, scale, reciprocal, INTEGER), mask=inside)
    else:
        tl.store(out + places, a.to(ROUND))
        if TAIL:
            tl.store(out + beyond, b.to(ROUND), mask=inside)
