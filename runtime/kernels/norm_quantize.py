"""LayerNorm or RMSNorm, and what stands before and after it, in one pass over the tokens.

    x <- round(x + branch * gate)                             only with a branch; in place; gate None is 1
    n  = (x - mean(x)) / sqrt(var(x) + eps)                   fp32, over the row
    y  = round(n * (1 + scale) + shift)                       `Modulation`, or
    y  = round(n * weight + bias)                             `Affine`, or
    y  = round(x / sqrt(mean(x^2) + eps) * weight)            `Rms`
    s  = max(absmax(y), 1e-30) / qmax,  q = round(y / s)      `norm_quantize`; `norm` returns y

round: to x's dtype; q: to nearest, ties to even (row_quantize.py). y is rounded before it is quantized
because the unfused path does so, and both must choose the same levels.

x and branch (..., D) bf16, fp16 or fp32, contiguous; scale, shift, gate, weight and bias D numbers each.
One program holds one row in registers, and where there are many does some of them in turn: gate, scale and
shift stay, and the next row is fetched while this one is summed. The bits are the same either way. With a
branch and int8 out 7 bytes for each bf16 entry, against 17 unfused. The residual stream x equals the twin's
bit for bit; y may differ by one rounding, because sums run in another order.
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

ROWS = 4
"""Of a program; with half the warps of a lone row: 0.42 against 0.53 ms for a gated residual of 32,760 rows
of 5,120 on the H200."""

FEW = 2048
"""Rows up to which a program has one: in turn, those of a prompt would leave most of a GPU idle."""


class Modulation(NamedTuple):
    """n·(1 + scale) + shift, for a norm that the time modulates; D fp32 numbers each."""

    shift: Tensor
    scale: Tensor


class Affine(NamedTuple):
    """n·weight + bias, for a norm with parameters of its own; D numbers each."""

    weight: Tensor
    bias: Tensor


class Rms(NamedTuple):
    """x/√(mean(x²) + eps)·weight, with no mean taken off and nothing added; D numbers."""

    weight: Tensor


class Residual(NamedTuple):
    """What is added to x first: branch (..., D) like x, times gate (D fp32 numbers; None is 1)."""

    branch: Tensor
    gate: Tensor | None = None


Scaling = Modulation | Affine | Rms


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
    if isinstance(scaling, Rms):
        return F.rms_norm(x.float(), width, scaling.weight.reshape(-1).float(), eps).to(x.dtype)
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
    x: Tensor, scaling: Scaling, eps: float, residual: Residual | None = None, warps: int = 0, rows: int = 0
) -> Tensor:
    """The kernel; `warps` and `rows` of a program 0: the numbers that suit the sizes."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, scaling, eps, residual, y, None, warps, rows or _together(x))
    return y


def norm_quantize_triton(
    x: Tensor,
    scaling: Scaling,
    eps: float,
    dtype: torch.dtype,
    residual: Residual | None = None,
    warps: int = 0,
    rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """The kernel; `warps` and `rows` of a program 0: the numbers that suit the sizes."""
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = rows or _together(x)
    row_scales = _room_for_scales(x, rows)
    _launch(x, scaling, eps, residual, q, row_scales, warps, rows)
    return q, row_scales


def _together(x: Tensor) -> int:
    """How many rows of x (..., D) a program does in turn."""
    return ROWS if x.numel() > FEW * x.shape[-1] else 1


def _room_for_scales(x: Tensor, together: int) -> Tensor:
    """(..., 1) fp32 for the rows of x (..., D), with room behind it for the rows that the last program lacks.

    So a scale is stored without asking: older interpreters of Triton do not look at the mask of one number.
    """
    rows = x.numel() // x.shape[-1]
    room = torch.empty(-(-rows // together) * together, dtype=torch.float32, device=x.device)
    return room[:rows].view(*x.shape[:-1], 1)


def _launch(
    x: Tensor,
    scaling: Scaling,
    eps: float,
    residual: Residual | None,
    out: Tensor,
    row_scales: Tensor | None,
    warps: int,
    together: int,
) -> None:
    rows = rows_of(x)
    count, width = rows.shape
    branch, gate = residual if residual is not None else (None, None)
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected that of x, {tuple(x.shape)}")
    factor, addend = _vectors_of(scaling, width)
    main, tail = row_parts(width)
    if not count:
        return
    with on(x):
        _norm_kernel[(-(-count // together),)](
            rows,
            rows if branch is None else rows_of(branch.contiguous(), "branch"),
            rows if gate is None else row_vector(gate, width, "gate"),
            factor,
            addend,
            out,
            rows if row_scales is None else row_scales,
            count,
            eps,
            WIDTH=width,
            MAIN=main,
            TAIL=tail,
            ROWS=together,
            RESIDUAL=branch is not None,
            GATED=gate is not None,
            CENTERED=not isinstance(scaling, Rms),
            MODULATED=isinstance(scaling, Modulation),
            QUANTIZE=row_scales is not None,
            INTEGER=out.dtype == torch.int8,
            num_warps=warps or max(warps_for(width) // 2, 1),
            enable_fp_fusion=False,
        )


def _vectors_of(scaling: Scaling, width: int) -> tuple[Tensor, Tensor]:
    """Multiplier and addend, (width,) each; the multiplier again where nothing is added."""
    if isinstance(scaling, Rms):
        weight = row_vector(scaling.weight, width, "weight")
        return weight, weight
    if isinstance(scaling, Modulation):
        return row_vector(scaling.scale, width, "scale"), row_vector(scaling.shift, width, "shift")
    return row_vector(scaling.weight, width, "weight"), row_vector(scaling.bias, width, "bias")


@jit
def _fetched(x, branch, places, inside, RESIDUAL: tl.constexpr):
    """A row of x and of the branch (x again where there is none), as they are stored."""
    value = tl.load(x + places, mask=inside, other=0.0)
    return value, tl.load(branch + places, mask=inside, other=0.0) if RESIDUAL else value


@jit
def _taken(value, added, gate, x, places, inside, RESIDUAL: tl.constexpr, GATED: tl.constexpr):
    """Part of the row in fp32, after the residual, which is stored."""
    taken = value.to(tl.float32)
    if RESIDUAL:
        more = added.to(tl.float32)
        if GATED:
            more = more * gate
        rounded = (taken + more).to(x.dtype.element_ty)
        tl.store(x + places, rounded, mask=inside)
        taken = rounded.to(tl.float32)
    return taken


@jit
def _vectors(
    gate, factor, addend, places, inside, GATED: tl.constexpr, CENTERED: tl.constexpr, MODULATED: tl.constexpr
):
    """What all rows share: the gate, the multiplier and the addend, fp32; another of them where one lacks."""
    multiplier = tl.load(factor + places, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        multiplier = 1.0 + multiplier
    plus = multiplier
    if CENTERED:
        plus = tl.load(addend + places, mask=inside, other=0.0).to(tl.float32)
    return tl.load(gate + places, mask=inside, other=0.0).to(tl.float32) if GATED else plus, multiplier, plus


@jit
def _scaled(normed, multiplier, plus, CENTERED: tl.constexpr):
    """Part of the normed row with its multiplier and, but for an RMSNorm, its addend, fp32."""
    scaled = normed * multiplier
    if CENTERED:
        scaled = tl.fma(normed, multiplier, plus)
    return scaled


@jit
def _norm_kernel(
    x,
    branch,
    gate,
    factor,
    addend,
    out,
    scales,
    count,
    eps,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    CENTERED: tl.constexpr,
    MODULATED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS
    x += row * WIDTH
    branch += row * WIDTH
    out += row * WIDTH
    ROUND: tl.constexpr = x.dtype.element_ty
    places = tl.arange(0, MAIN)
    whole = places < WIDTH
    gate_a, multiplier_a, plus_a = _vectors(gate, factor, addend, places, whole, GATED, CENTERED, MODULATED)
    value_a, added_a = _fetched(x, branch, places, whole, RESIDUAL)
    if TAIL:
        beyond = MAIN + tl.arange(0, TAIL)
        within = beyond < WIDTH
        gate_b, multiplier_b, plus_b = _vectors(
            gate, factor, addend, beyond, within, GATED, CENTERED, MODULATED
        )
        value_b, added_b = _fetched(x, branch, beyond, within, RESIDUAL)
    end = tl.minimum(row + ROWS, count)
    for _ in range(ROWS):
        there = row < count
        inside_a = whole & there
        a = _taken(value_a, added_a, gate_a, x, places, inside_a, RESIDUAL, GATED)
        if CENTERED:
            total = tl.sum(a, axis=0)
        if TAIL:
            inside_b = within & there
            b = _taken(value_b, added_b, gate_b, x, beyond, inside_b, RESIDUAL, GATED)
            if CENTERED:
                total += tl.sum(b, axis=0)
        x += WIDTH
        branch += WIDTH
        if ROWS > 1:  # the next row is on its way while this one is summed, and summed again
            more = row + 1 < end
            value_a, added_a = _fetched(x, branch, places, whole & more, RESIDUAL)
            if TAIL:
                value_b, added_b = _fetched(x, branch, beyond, within & more, RESIDUAL)
        if CENTERED:
            mean = total / WIDTH
            a = a - mean
            if TAIL:
                b = tl.where(within, b - mean, 0.0)
        squares = tl.sum(a * a, axis=0)
        if TAIL:
            squares += tl.sum(b * b, axis=0)
        inverse = 1.0 / tl.sqrt(squares / WIDTH + eps)
        a = _scaled(a * inverse, multiplier_a, plus_a, CENTERED).to(ROUND).to(tl.float32)
        if TAIL:
            b = _scaled(b * inverse, multiplier_b, plus_b, CENTERED).to(ROUND).to(tl.float32)
        if QUANTIZE:
            bits = absmax_bits(a)
            if TAIL:
                bits = tl.maximum(bits, absmax_bits(b))
            scale, reciprocal, stored = row_scale(bits, INTEGER)
            tl.store(scales + row, stored)
            tl.store(out + places, quantized(a, scale, reciprocal, INTEGER), mask=inside_a)
            if TAIL:
                tl.store(out + beyond, quantized(b, scale, reciprocal, INTEGER), mask=inside_b)
        else:
            tl.store(out + places, a.to(ROUND), mask=inside_a)
            if TAIL:
                tl.store(out + beyond, b.to(ROUND), mask=inside_b)
        out += WIDTH
        row += 1
