"""Linear with e4m3 weights and e4m3 activations (W8A8): LightX2V's fp8 files, and ComfyUI's after expansion.

Layout in the file and here: weight (out, in) e4m3, row-major; weight_scale (out, 1) fp32; bias (out,).

    s_a[m] = absmax(x[m]) / 448
    q[m]   = e4m3(x[m] / s_a[m]), saturated, ties to even; a row of zeros stays zero
    y[m,n] = round( (q[m] . w[n]) * s_a[m] * s_w[n] + bias[n] )      summed in fp32, rounded once

Ways to multiply, the first that works on the GPU, found by a trial run that is checked against `reference`:
  rowwise      torch._scaled_mm with both scales in its epilogue. Hopper and newer; on Ada it depends on the
               version of torch. It writes bf16 only and takes a bias in bf16: one stored in fp32 is rounded.
  unscaled     torch._scaled_mm with scales of 1 and fp32 output, then the scales and the bias. Ada and newer;
               the way for fp16 and fp32 activations too.
  fused        our own kernel with the scales and the bias in its epilogue (runtime/kernels/w8a8.py, Triton):
               where torch has neither, and for the sizes at which it was measured to be faster (`prefer`)
  dequantized  W in x's dtype and a plain product: Ampere, which has no fp8, and sizes that are no multiple
               of 16.
On the CPU it is `reference`.

_scaled_mm wants its second operand column-major: `weight.t()` of a row-major weight is that without a copy.
Its `use_fast_accum` is off: sums of 13,824 products have an RMS error of 1.3e-4 then, 2.8e-3 with it (H200)
"""

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from runtime.kernels.configs import chosen
from runtime.kernels.launch import E4M3, LOWEST, capability, fused, trouble
from runtime.kernels.row_quantize import row_quantize
from runtime.kernels.w8a8 import w8a8, w8a8_triton
from runtime.linear.module import (
    MIN_ROWS,
    QuantizedLinear,
    first_working,
    forced,
    pad_rows,
    preferred,
    rescale,
)
from runtime.linear.quantize import FP8, Format, quantize_rows

FAST_ACCUMULATION = False
_MULTIPLE = 16  # _scaled_mm wants both sizes of the weight to be multiples of this


class Fp8Linear(QuantizedLinear):
    """y = x W^T + bias, with e4m3 weights scaled per output channel and activations scaled per token."""

    form: ClassVar[Format] = FP8
    PREPARED: ClassVar[tuple[str, ...]] = ("rowwise", "fused")

    def multiply(self, rows: Tensor, way: str) -> Tensor:
        """rows (M, in) -> (M, out), in the way that the device has."""
        if way == "reference":
            return self.in_slices(rows, self._reference)
        if way == "rowwise":
            return self.in_slices(rows, self._rowwise)
        if way == "unscaled":
            return self.in_slices(rows, self._unscaled)
        if way == "fused":
            return self.product(*row_quantize(rows, E4M3), rows.dtype, way=way)
        return self.dequantized(rows)

    def product(
        self, q: Tensor, scale: Tensor, dtype: torch.dtype, into: Tensor | None = None, way: str | None = None
    ) -> Tensor:
        """rowwise, for bf16 alone, or fused: the ways that take quantized rows whole."""
        if (way or self._way(q, dtype)) == "fused":
            operands = (q, self.weight, scale, self.weight_scale, self.bias, dtype)
            return w8a8(*operands, fast=FAST_ACCUMULATION, into=into)
        return self._rowwise(q, scale, into)

    def way(self, rows: Tensor) -> str:
        """How rows are multiplied on their device; the names stand at the head of this file."""
        return self._way(rows, rows.dtype)

    def _way(self, rows: Tensor, dtype: torch.dtype) -> str:
        if forced_name := forced():
            return forced_name
        device = rows.device
        if device.type != "cuda":
            return "reference"
        if self.in_features % _MULTIPLE or self.out_features % _MULTIPLE:
            return "dequantized"
        measured = preferred(device, E4M3, self.out_features, self.in_features)
        if measured == "fused" and fused(rows, E4M3) and _fused_works(device):
            return "fused"
        way = _device_way(device)
        return "unscaled" if way == "rowwise" and dtype != torch.bfloat16 else way

    def _reference(self, q: Tensor, scale: Tensor) -> Tensor:
        return rescale(q.float() @ self.weight.float().t(), scale, self.weight_scale, self.bias)

    def _rowwise(self, q: Tensor, scale: Tensor, into: Tensor | None = None) -> Tensor:
        bias = self.bias
        bias = None if bias is None else bias.to(torch.bfloat16)
        return scaled_mm_rowwise(q, self.weight, scale, self.weight_scale, bias, into)

    def _unscaled(self, q: Tensor, scale: Tensor) -> Tensor:
        return rescale(scaled_mm_unscaled(q, self.weight), scale, self.weight_scale, self.bias)


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """The formula in plain torch: x (M, in), weight (out, in), weight_scale (out, 1) -> (M, out) like x.

    accumulate=float64 makes the dot product exact (products of e4m3 numbers are); the rest is fp32 as on the
    GPU.
    """
    q, scale = quantize_rows(x, FP8)
    acc = q.to(accumulate) @ weight.to(accumulate).t()
    return rescale(acc.float(), scale, weight_scale, bias).to(x.dtype)


def scaled_mm_rowwise(
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    into: Tensor | None = None,
) -> Tensor:
    """q (M, in), scale (M, 1), weight (out, in), weight_scale (out, 1), bf16 bias (out,) -> (M, out) bf16.

    into: where the result goes, if it is given and no rows have to be added.
    """
    rows = q.shape[0]
    if rows < MIN_ROWS:
        padded_scale = scale.new_ones((MIN_ROWS, 1))
        padded_scale[:rows] = scale
        return scaled_mm_rowwise(pad_rows(q), weight, padded_scale, weight_scale, bias)[:rows]
    return torch._scaled_mm(
        q,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale.reshape(1, -1),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
        **({} if into is None else {"out": into}),
    )


def scaled_mm_unscaled(q: Tensor, weight: Tensor) -> Tensor:
    """q (M, in) e4m3, weight (out, in) e4m3 -> their product (M, out) fp32, unscaled.

    A sum of K products is below 448 * 448 * K, so fp32 cannot overflow.
    """
    one = torch.ones((), dtype=torch.float32, device=q.device)
    y = torch._scaled_mm(
        pad_rows(q),
        weight.t(),
        scale_a=one,
        scale_b=one,
        out_dtype=torch.float32,
        use_fast_accum=FAST_ACCUMULATION,
    )
    return y[: q.shape[0]]


@cache
def _device_way(device: torch.device) -> str:
    """The best way of this GPU; three small products, once per process."""
    trials = {"rowwise": _try_rowwise, "unscaled": _try_unscaled, "fused": _try_fused}
    return first_working(device, trials, otherwise="dequantized")


@cache
def _fused_works(device: torch.device) -> bool:
    """Whether our own kernel is right on this GPU; one small product, once per process."""
    return first_working(device, {"fused": _try_fused}, otherwise="") == "fused"


def _example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (48, 64) bf16, weight (32, 64) e4m3, weight_scale (32, 1), bias (32,) bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 64, generator=generator)
    weight, weight_scale = quantize_rows(torch.randn(32, 64, generator=generator), FP8)
    bias = torch.randn(32, generator=generator)
    return x.bfloat16().to(device), weight.to(device), weight_scale.to(device), bias.bfloat16().to(device)


def _agrees(y: Tensor, expected: Tensor) -> bool:
    # bf16 rounding of entries of about 8 is .03; a wrong scale or layout is off by their size
    return bool(torch.allclose(y.float(), expected.float(), rtol=0.02, atol=0.1))


def _try_rowwise(device: torch.device) -> bool:
    x, weight, weight_scale, bias = _example(device)
    q, scale = quantize_rows(x, FP8)
    return _agrees(
        scaled_mm_rowwise(q, weight, scale, weight_scale, bias), reference(x, weight, weight_scale, bias)
    )


def _try_unscaled(device: torch.device) -> bool:
    x, weight, weight_scale, bias = _example(device)
    q, scale = quantize_rows(x, FP8)
    y = rescale(scaled_mm_unscaled(q, weight), scale, weight_scale, bias)
    return _agrees(y, reference(x, weight, weight_scale, bias))


def _try_fused(device: torch.device) -> bool:
    # Not `fused`, which also says whether kernels are wanted now: the answer here is for the whole process.
    if capability(device) < LOWEST[E4M3] or trouble(device) is not None:
        return False
    x, weight, weight_scale, bias = _example(device)
    q, scale = quantize_rows(x, FP8)
    config = chosen(device, E4M3, *weight.shape)
    y = w8a8_triton(q, weight, scale, weight_scale, bias, torch.bfloat16, False, FAST_ACCUMULATION, config)
    return _agrees(y, reference(x, weight, weight_scale, bias))
