"""What the kernels' tests share: inputs that are hard to get right, and distances between results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from runtime.kernels.launch import E4M3
from runtime.kernels.norm_quantize import Affine, Modulation, Rms, Scaling

FORMATS = [torch.int8, E4M3]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Quantized = tuple[Tensor, Tensor]
SCALINGS: dict[str, Callable[[int, str], Scaling]] = {
    "modulated": lambda width, device: Modulation(vector(width, 1, device), vector(width, 2, device)),
    "affine": lambda width, device: Affine(vector(width, 3, device), vector(width, 4, device)),
    "rms": lambda width, device: Rms(vector(width, 5, device).bfloat16()),
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


NORMED_HEADS = [(40, 128), (12, 128), (3, 64), (9, 32), (17, 16), (1, 128)]  # (H, D)


class NormedHeads(NamedTuple):
    """What `rms_rope_quantize` takes."""

    x: Tensor
    weight: Tensor
    eps: float
    head_dim: int
    factor: Tensor
    center: Tensor | None
    table: tuple[Tensor, Tensor] | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(self)


def normed_heads(
    rows: tuple[int, int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    rope: bool,
    center: bool,
    device: str = "cpu",
) -> NormedHeads:
    """x (*rows, H·D) with large channels, a weight with a spread, factors for which a little saturates."""
    g = torch.Generator(device).manual_seed(rows[1] + heads)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    width = heads * head_dim
    x = randn(*rows, width) * randn(*rows, 1).exp()
    x[..., 3 :: max(width // 9, 1)] *= 8
    x[..., 5 :: max(width // 3, 1)] *= 30
    weight = randn(width).exp()
    middle = 5 * randn(heads, head_dim) if center else None
    angles = 9 * randn(rows[1], 1, head_dim // 2)
    z = torch.nn.functional.rms_norm(x, (width,), weight).unflatten(-1, (heads, head_dim))
    size = z.square().sum(-1).mean((0, 1)).sqrt() + (5 if center else 0)  # of a number after the rotation
    factor = 448 / (2 * size) * torch.rand(heads, generator=g, device=device).add(0.5)
    table = (angles.cos(), angles.sin()) if rope else None
    return NormedHeads(x.to(dtype), weight, 1e-6, head_dim, factor, middle, table)


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
