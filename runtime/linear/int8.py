"""Linear with int8 weights and int8 activations (W8A8): LightX2V's int8 checkpoints.

Layout in the file and here: weight (out, in) int8, row-major; weight_scale (out, 1) fp32; bias (out,).

    s_a[m] = absmax(x[m]) / 127        q[m] = round(x[m] / s_a[m]), ties to even; a zero row stays zero
    y[m,n] = round( (q[m] . w[n]) * s_a[m] * s_w[n] + bias[n] )       dot product exact in int32, one rounding

The sum of K products is below 127 * 128 * K: int32 holds it up to K = 132,000, fp32 is exact only up to 2^24.

Ways to multiply, found once per GPU by a trial run that is checked against `reference`:
  fused        our own kernel with the scales and the bias in its epilogue (runtime/kernels/w8a8.py, Triton)
  integer      torch._int_mm (tensor cores from Turing on; more than 16 rows, both sizes multiples of 8),
               then the scales and the bias
  dequantized  W in x's dtype and a plain product: sizes that are no multiple of 8, GPUs without the kernel
On the CPU it is `reference`.
"""

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from runtime.kernels.configs import chosen
from runtime.kernels.launch import LOWEST, capability, fused, trouble
from runtime.kernels.row_quantize import row_quantize
from runtime.kernels.w8a8 import w8a8, w8a8_triton
from runtime.linear.module import QuantizedLinear, first_working, forced, pad_rows, rescale
from runtime.linear.quantize import INT8, Format, quantize_rows

_TILE = 16  # the fused kernel wants both sizes of the weight to be multiples of this
_MULTIPLE = 8  # _int_mm wants both sizes of the weight to be multiples of this
_EXACT_TERMS = 1024  # 127 * 128 * 1024 < 2^24: so many products sum exactly in fp32


class Int8Linear(QuantizedLinear):
    """y = x W^T + bias, with int8 weights scaled per output channel and activations scaled per token."""

    form: ClassVar[Format] = INT8
    PREPARED: ClassVar[tuple[str, ...]] = ("fused",)

    def multiply(self, rows: Tensor, way: str) -> Tensor:
        """rows (M, in) -> (M, out), in the way that the device has."""
        if way == "reference":
            return self.in_slices(rows, self._reference)
        if way == "fused":
            return self.product(*row_quantize(rows, torch.int8), rows.dtype)
        if way == "integer":
            return self.in_slices(rows, self._integer)
        return self.dequantized(rows)

    def product(
        self, q: Tensor, scale: Tensor, dtype: torch.dtype, into: Tensor | None = None, way: str | None = None
    ) -> Tensor:
        """fused, which is the one way that takes quantized rows whole."""
        return w8a8(q, self.weight, scale, self.weight_scale, self.bias, dtype, into=into)

    def way(self, rows: Tensor) -> str:
        """How rows are multiplied on their device; the names stand at the head of this file."""
        if forced_name := forced():
            return forced_name
        if rows.device.type != "cuda":
            return "reference"
        if self.in_features % _MULTIPLE or self.out_features % _MULTIPLE:
            return "dequantized"
        way = _device_way(rows.device)
        whole_tiles = self.in_features % _TILE == 0 and self.out_features % _TILE == 0
        # Where kernels are not wanted now: the fused product's own twin holds whole weights in fp32.
        usable = whole_tiles and fused(rows, torch.int8)
        return "integer" if way == "fused" and not usable else way

    def _reference(self, q: Tensor, scale: Tensor) -> Tensor:
        return rescale(exact_product(q, self.weight), scale, self.weight_scale, self.bias)

    def _integer(self, q: Tensor, scale: Tensor) -> Tensor:
        return rescale(int_mm(q, self.weight), scale, self.weight_scale, self.bias)


def reference(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The formula in plain torch: x (M, in), weight (out, in), weight_scale (out, 1) -> (M, out) like x."""
    q, scale = quantize_rows(x, INT8)
    return rescale(exact_product(q, weight), scale, weight_scale, bias).to(x.dtype)


def exact_product(q: Tensor, weight: Tensor) -> Tensor:
    """q (M, K) int8 in -127..127, weight (N, K) int8 -> (M, N) int32, exact on any device.

    In fp32, where BLAS is fast, over slices of K so short that every partial sum is an integer below 2^24.
    """
    acc = torch.zeros((q.shape[0], weight.shape[0]), dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], _EXACT_TERMS):
        terms = slice(start, start + _EXACT_TERMS)
        acc += (q[:, terms].float() @ weight[:, terms].float().t()).to(torch.int32)
    return acc


def int_mm(q: Tensor, weight: Tensor) -> Tensor:
    """q (M, K) int8, weight (N, K) int8 -> (M, N) int32 by the GPU's integer tensor cores."""
    return torch._int_mm(pad_rows(q), weight.t())[: q.shape[0]]


@cache
def _device_way(device: torch.device) -> str:
    """The best way of this GPU; two small products, once per process."""
    return first_working(device, {"fused": _try_fused, "integer": _try_integer}, otherwise="dequantized")


def _try_fused(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 512, generator=generator).bfloat16().to(device)
    # Not `fused`, which also says whether kernels are wanted now: this answer is for the whole process.
    if capability(device) < LOWEST[torch.int8] or trouble(device) is not None:
        return False
    weight = torch.randint(-128, 128, (384, 512), generator=generator, dtype=torch.int8).to(device)
    weight_scale = torch.rand(384, 1, generator=generator).add_(0.5).to(device)
    bias = torch.randn(384, generator=generator).to(device)
    q, scale = quantize_rows(x, INT8)
    config = chosen(device, torch.int8, *weight.shape)
    y = w8a8_triton(q, weight, scale, weight_scale, bias, torch.float32, False, False, config)
    expected = rescale(exact_product(q, weight), scale, weight_scale, bias)
    return torch.allclose(y, expected, rtol=1e-5, atol=1e-3)  # an exact sum, then three fp32 roundings


def _try_integer(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (48, 64), generator=generator, dtype=torch.int8).to(device)
    weight = torch.randint(-128, 128, (32, 64), generator=generator, dtype=torch.int8).to(device)
    return torch.equal(int_mm(q, weight), exact_product(q, weight))
