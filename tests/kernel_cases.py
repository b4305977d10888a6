"""What the kernels' tests share: inputs that are hard to get right, and distances between results."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from runtime.kernels.launch import E4M3
from runtime.kernels.norm_quantize import Affine, Modulation, Scaling

FORMATS = [torch.int8, E4M3]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Quantized = tuple[Tensor, Tensor]
SCALINGS: dict[str, Callable[[int, str], Scaling]] = {
    "modulated": lambda width, device: Modulation(vector(width, 1, device), vector(width, 2, device)),
    "affine": lambda width, device: Affine(vector(width, 3, device), vector(width, 4, device)),
}


def tokens(count: int, width: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensor:
    """Rows of different sizes, all with outliers; from five rows on, one of zeros, one huge, one tiny."""
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(count, width, generator=g, device=device)
    x *= torch.rand(count, 1, generator=g, device=device).mul(4).add(0.1)
    x[:, :: max(width // 9, 1)] *= 20
    if count > 4:
        x[1] = 0
        x[2] *= 3000 if dtype != torch.float16 else 10  # whose largest number is 65,504
        x[3] *= 1e-6
    return x.to(dtype)


def vector(width: int, seed: int, device: str = "cpu") -> Tensor:
    """(width,) fp32."""
    return torch.randn(width, generator=torch.Generator(device).manual_seed(seed), device=device)


def levels(q: Tensor) -> Tensor:
    """The place of each 8-bit number in the order of all: neighbours differ by 1."""
    if q.dtype == torch.int8:
        return q.int()
    bits = q.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def compare(name: str, got: Quantized, expected: Quantized, rate: float, scale_error: float = 0.0) -> None:
    """At most `rate` of q one level off, none further; scales within `scale_error`, relative."""
    off = (levels(got[0]) - levels(expected[0])).abs()
    share, worst = float((off > 0).float().mean()), int(off.max())
    scale_off = float(((got[1] - expected[1]).abs() / expected[1]).max())
    print(f"{name}: {share:.1e} of q differ, by {worst} levels at most; scales by {scale_off:.1e}")
    assert got[0].shape == expected[0].shape and got[1].shape == expected[1].shape
    assert worst <= 1 and share <= rate and scale_off <= scale_error, name


def roundings(got: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the dtype's rounding, at the size of the entry or of its row's mean."""
    size = expected.double().abs()
    size = torch.maximum(size, size.mean(-1, keepdim=True)).clamp_min(1e-20)
    return float(((got.double() - expected.double()).abs() / size).max() / torch.finfo(got.dtype).eps)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of a value that no right answer has, so what a kernel leaves out is seen."""
    empty = torch.empty

    def poisoned(*sizes: object, **options: object) -> Tensor:
        made = empty(*sizes, **options)  # type: ignore[call-overload]
        made.view(torch.uint8).fill_(0xF7)
        return made

    monkeypatch.setattr(torch, "empty", poisoned)
