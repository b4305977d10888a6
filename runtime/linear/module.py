"""What the 8-bit Linear classes share: their tensors, and the walk from x of any shape to y of its dtype.

    y[m,n] = round( acc[m,n] * s_a[m] * s_w[n] + bias[n] )      acc = q_a @ q_w^T, in fp32 (fp8) or int32

The sum is evaluated in fp32 and rounded once, to x's dtype. For all tokens of a video, x in fp32 or acc would
be gigabytes, so rows go through in slices of bounded size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from runtime.kernels.launch import fused
from runtime.kernels.prepared import Prepared
from runtime.kernels.row_quantize import row_quantize
from runtime.linear.quantize import Format, dequantize, quantize_rows

SLICE_ELEMENTS = 2**25  # of acc or of x in fp32 at a time: 128 MiB, and still enough rows to fill any GPU
MIN_ROWS = 32  # torch._int_mm refuses 16 rows and fewer; padding rows are zeros and are cut off again

Finish = Callable[[Tensor, Tensor], Tensor]  # q_a (m, in), s_a (m, 1) -> y (m, out)


class QuantizedLinear(nn.Module):
    """y = x W^T + bias with W kept in eight bits. Subclasses say the format and how to multiply.

    Tensors: weight (out, in) of the format's dtype; weight_scale (out, 1) fp32; bias (out,), floating,
    optional. All are buffers: they are read from a checkpoint, copied between devices, and never trained.
    """

    form: ClassVar[Format]
    PREPARED: ClassVar[tuple[str, ...]] = ()  # the ways that take quantized rows whole

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight: Tensor
        self.weight_scale: Tensor
        self.bias: Tensor | None
        empty = torch.empty((out_features, in_features), dtype=self.form.dtype, device=device)
        self.register_buffer("weight", empty)
        self.register_buffer(
            "weight_scale", torch.empty((out_features, 1), dtype=torch.float32, device=device)
        )
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    def extra_repr(self) -> str:
        """in, out, bias and format, as nn.Linear prints them."""
        has_bias = self.bias is not None
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={has_bias}, {self.form.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the tensors as nn.Module does; refuses casts, which would make noise of weights or scales."""
        super()._apply(fn, recurse)
        if self.weight.dtype != self.form.dtype or self.weight_scale.dtype != torch.float32:
            raise TypeError(
                f"{self.form.name} weights and their scales cannot be cast; move them to a device only"
            )
        return self

    def forward(self, x: Tensor | Prepared, into: Tensor | None = None) -> Tensor:
        """x (..., in), bf16, fp16 or fp32, or such rows prepared -> (..., out) of their dtype.

        into: contiguous memory for the result, which a product of prepared rows may use.
        """
        if isinstance(x, Prepared):
            values, scales, dtype = x
            q = values.reshape(-1, self.in_features)  # (M, in)
            place = None if into is None else into.view(-1, self.out_features)
            y = self.product(q, scales.reshape(-1, 1), dtype, place)
            return y.reshape(*values.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features)  # (M, in)
        way = self.way(rows)  # asked once: of a short product, the host's time is most
        if self._whole(way, rows):
            y = self.product(*row_quantize(rows, self.form.dtype), rows.dtype, way=way)
        else:
            y = self.multiply(rows, way)
        return y.reshape(*x.shape[:-1], self.out_features)

    def takes(self, x: Tensor) -> torch.dtype | None:
        """The 8-bit dtype of rows that this layer multiplies as they are; None where it wants x itself.

        Then a kernel that makes x may quantize it on the way, once for all layers that read it.
        """
        return self.form.dtype if self._whole(self.way(x), x) else None

    def _whole(self, way: str, x: Tensor) -> bool:
        """Whether rows like x are quantized by a kernel and multiplied whole, `way` being how."""
        return way in self.PREPARED and fused(x, self.form.dtype)

    def way(self, x: Tensor) -> str:
        """How x (..., in) is multiplied on its device: one of the ways of the class."""
        raise NotImplementedError

    def product(
        self, q: Tensor, scale: Tensor, dtype: torch.dtype, into: Tensor | None = None, way: str | None = None
    ) -> Tensor:
        """q (M, in) quantized, scale (M, 1) -> (M, out) of dtype, in one of the ways of PREPARED.

        into: (M, out) contiguous of dtype, where the result may go. way: that of such rows, if it is known.
        """
        raise NotImplementedError

    def multiply(self, rows: Tensor, way: str) -> Tensor:
        """rows (M, in) -> (M, out), `way` being theirs."""
        raise NotImplementedError

    def dequantized(self, rows: Tensor) -> Tensor:
        """Weight-only: W in x's dtype and a plain product, for GPUs and sizes without an 8-bit product.

        There the activations are not quantized: nothing would be gained.
        """
        weight = dequantize(self.weight, self.weight_scale, rows.dtype)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        return nn.functional.linear(rows, weight, bias)

    def in_slices(self, rows: Tensor, finish: Finish) -> Tensor:
        """Quantize rows (M, in) and `finish` them, slice by slice -> (M, out) in the dtype of rows."""
        count = rows.shape[0]
        step = max(SLICE_ELEMENTS // max(self.out_features, self.in_features) // 256 * 256, 256)
        y = torch.empty((count, self.out_features), dtype=rows.dtype, device=rows.device)
        for start in range(0, count, step):
            # _scaled_mm takes row-major operands only, and quantizing keeps the strides of what came in.
            q, scale = quantize_rows(rows[start : start + step].contiguous(), self.form)
            y[start : start + step] = finish(q, scale)
        return y


def pad_rows(q: Tensor) -> Tensor:
    """q (M, K), with rows of zeros below it if M < MIN_ROWS."""
    lacking = MIN_ROWS - q.shape[0]
    if lacking <= 0:
        return q
    padded = torch.zeros((MIN_ROWS, q.shape[1]), dtype=torch.uint8, device=q.device)
    padded[: q.shape[0]] = q.view(torch.uint8)  # bytes: few operations know fp8
    return padded.view(q.dtype)


def rescale(acc: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """acc * s_a * s_w + bias in fp32: acc (M, N), scale (M, 1), weight_scale (N, 1), bias (N,) -> (M, N)."""
    y = acc.float() if acc.dtype != torch.float32 else acc
    y = y.mul_(scale).mul_(weight_scale.reshape(1, -1))
    return y if bias is None else y.add_(bias)


_forced: list[str] = []


@contextmanager
def forced_way(name: str) -> Iterator[None]:
    """Inside, 8-bit Linears multiply in the way of this name, working or not; for tests and measurements."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The way that the innermost `forced_way` names, None outside of one."""
    return _forced[-1] if _forced else None


_measured: dict[tuple[torch.device, torch.dtype, int, int], str] = {}


def prefer(way: str | None, device: torch.device, dtype: torch.dtype, columns: int, depth: int) -> None:
    """From now on, layers with a weight (columns, depth) of `dtype` multiply in this way on `device`.

    As far as it works there; None: in the first one that does. Of the ways that need no more memory than
    the usual one, whoever measured says which.
    """
    key = (device, dtype, columns, depth)
    if way is None:
        _measured.pop(key, None)
    else:
        _measured[key] = way


def preferred(device: torch.device, dtype: torch.dtype, columns: int, depth: int) -> str | None:
    """The way that was measured to be the fastest for such a weight, None where nobody did."""
    return _measured.get((device, dtype, columns, depth))


def first_working(
    device: torch.device, trials: Mapping[str, Callable[[torch.device], bool]], otherwise: str
) -> str:
    """The first way whose trial run is right on `device`, else `otherwise`.

    A trial that raises is how torch says that this GPU, or this version of it, lacks the kernel.
    """
    for name, trial in trials.items():
        try:
            works = trial(device)
        except (RuntimeError, ValueError, TypeError, AttributeError):
            works = False
        if works:
            return name
    return otherwise
