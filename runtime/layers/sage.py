"""SageAttention, where that package is installed: which of its kernels this GPU takes, and with what options.

    find_v2("fast", (8, 9))           SageAttention 2 on sm_89, or None
    find_v1((8, 6))                   SageAttention 1, or None

q·kᵀ is in int8, after k has lost its mean over the tokens. What differs is the second product, of the
probabilities p and the values v, and what its sums are kept in:

| wanted | p and v | sums | where |
|---|---|---|---|
| fast | fp16 | fp32 | sm_80 |
| fast | fp16 | fp16 within 64 keys, joined in fp32 | sm_86, by a kernel in Triton |
| fast | fp8 | fp32 | sm_89 and sm_12x where fp16 sums were not compiled |
| fast | fp8 | fp16, joined in fp32 | sm_89 and sm_12x elsewhere |
| sm90 | fp8 | fp32 | sm_90, by a kernel of its own that needs more memory |
| fp32 | fp8 | fp32 | sm_89 and sm_12x, where `fast` has fp16 sums |
| fp16 | fp16 | fp32 | all but sm_80, where `fast` is that |

`fast` and `sm90` are for speed; the other two are the rungs below, so each is None where it would be the same
again. Tokens share scales by warp, not by thread as is the release's default: its quantization by thread is a
kernel in Triton that leaves the scale of the last tile to what happens to lie in a register, its own authors
call it unusable on sm_12x, and by warp is 3 % faster on an H200 and as close. Fewer than 64 queries or keys
are torch's: one query on one key is NaN.
SageAttention 1 (1.0.6, the newest that a plain `pip install` finds) is an older release of the same package:
one function, fp16 probabilities with fp16 sums within 64 keys, Triton alone.

What release 2 has in CUDA launches on the legacy default stream whatever the current stream is, unless its
build was changed (this project's images change it). So q, k and v must have been made on the default stream,
and the result read there; on another stream the numbers are silently wrong. That a kernel is found proves
nothing: `backends.prove` does.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from runtime.layers.attention import Run, attend
from runtime.layers.packages import package

_PACKAGE = "sageattention"
_FEWEST = 64  # queries, or keys
_TILE_OF_1 = 64  # keys
_LONG_FOR_1 = 16384  # keys, of which up to 63 too many are no more than one rounding of bf16
_OF_2 = "sageattn_qk_int8_pv_fp8_cuda"  # which release 1 has not


def find_v2(wanted: str, capability: tuple[int, int]) -> Run | None:
    """SageAttention 2 as `wanted`: "fast", "sm90", "fp32" sums or "fp16" probabilities; None without it."""
    sage = package(_PACKAGE)
    if sage is None or not hasattr(sage, _OF_2):
        return None
    variant = _variant(wanted, capability)
    return None if variant is None else _bound(sage, f"sageattn_qk_int8_pv_{variant[0]}", variant[1])


def find_v1(_capability: tuple[int, int]) -> Run | None:
    """SageAttention 1; None where it is missing, or where release 2 is installed instead."""
    sage = package(_PACKAGE)
    function = None if sage is None or hasattr(sage, _OF_2) else getattr(sage, "sageattn", None)
    return None if function is None else partial(run_v1, function)


def run_v1(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale)·v by release 1's `sageattn`; q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D).

    Its last tile is not masked: the keys that are missing there count as zeros, whose score is 0. As the mean
    score is 0 too, the sum of S weights is at least S, and n keys too many shrink the result by n / (S + n)
    at most: torch computes what has few keys in tiles that are not full. k is copied, since `sageattn` would
    take the mean away in the caller's.
    """
    if k.shape[1] % _TILE_OF_1 and k.shape[1] < _LONG_FOR_1:
        return attend(q, k, v, scale)
    centered = k - k.mean(1, keepdim=True)
    return function(q, centered, v, sm_scale=scale, tensor_layout="NHD", is_causal=False, smooth_k=False)


def _variant(wanted: str, capability: tuple[int, int]) -> tuple[str, dict[str, str]] | None:
    """(end of the function's name, options), or None."""
    by_warp = {"qk_quant_gran": "per_warp"}
    if wanted == "fp16":
        return None if capability == (8, 0) else ("fp16_cuda", {"pv_accum_dtype": "fp32"} | by_warp)
    if wanted == "sm90":
        sums = {"pv_accum_dtype": "fp32+fp32"}
        return ("fp8_cuda_sm90", sums | by_warp) if capability == (9, 0) else None
    if capability == (8, 9) or capability[0] == 12:
        half = half_sums_compiled()
        if wanted == "fp32" and not half:
            return None
        sums = {"pv_accum_dtype": "fp32+fp16" if half and wanted == "fast" else "fp32+fp32"}
        return "fp8_cuda", sums | by_warp
    if wanted == "fp32":
        return None
    others = {
        (8, 0): ("fp16_cuda", {"pv_accum_dtype": "fp32"} | by_warp),
        (8, 6): ("fp16_triton", dict[str, str]()),
    }
    return others.get(capability)


def half_sums_compiled(version: str | None = torch.version.cuda) -> bool:
    """Whether SageAttention's fp16 sums exist: compilers before CUDA 12.8 leave a trap in their place."""
    return version is not None and tuple(int(part) for part in version.split(".")[:2]) >= (12, 8)


def _bound(sage: ModuleType, name: str, options: dict[str, str]) -> Run | None:
    function = getattr(sage, name, None)
    if function is None:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if min(q.shape[1], k.shape[1]) < _FEWEST:
            return attend(q, k, v, scale)
        return function(q, k, v, sm_scale=scale, tensor_layout="NHD", is_causal=False, **options)

    return run
