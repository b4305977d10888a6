"""SageAttention, where that package is installed: which of its kernels this GPU takes, and with what options.

    find_v2("fast", (8, 9))           SageAttention 2 on sm_89, or None
    find_v1((8, 6))                   SageAttention 1, or None

q·kᵀ is in int8, after k has lost its mean over the tokens. What differs is the second product, of the
probabilities p and the values v, and what its sums are kept in:

| wanted | p and v | sums | where |
|---|---|---|---|
| fast | fp16 | fp32 | sm_80; sm_86, there by a kernel in Triton |
| fast | fp8 | fp32 | sm_90; sm_89 and sm_12x where fp16 sums were not compiled |
| fast | fp8 | fp16, joined in fp32 | sm_89 and sm_12x elsewhere |
| fp32 | fp8 | fp32 | sm_89 and sm_12x, where `fast` has fp16 sums |
| fp16 | fp16 | fp32 | all but sm_86, where `fast` is that |

`fast` is for speed; the other two are the rungs below it, so each is None where it would be the same again.
SageAttention 1 is an older release of the same package: one function that chooses for itself, fp16
probabilities, Triton alone.

Both launch on the legacy default stream whatever the current stream is, so q, k and v must have been made on
it, and the result read there; on another stream the numbers are silently wrong. That a kernel is found proves
nothing: `backends.prove` does.
"""

from types import ModuleType

import torch
from torch import Tensor

from runtime.layers.attention import Run
from runtime.layers.packages import package

_PACKAGE = "sageattention"
_OF_2 = "sageattn_qk_int8_pv_fp8_cuda"  # which release 1 has not


def find_v2(wanted: str, capability: tuple[int, int]) -> Run | None:
    """SageAttention 2 as `wanted`: "fast", "fp32" (sums) or "fp16" (probabilities); None without that."""
    sage = package(_PACKAGE)
    if sage is None or not hasattr(sage, _OF_2):
        return None
    variant = _variant(wanted, capability)
    return None if variant is None else _bound(sage, f"sageattn_qk_int8_pv_{variant[0]}", variant[1])


def find_v1(_capability: tuple[int, int]) -> Run | None:
    """SageAttention 1; None where it is missing, or where release 2 is installed instead."""
    sage = package(_PACKAGE)
    return None if sage is None or hasattr(sage, _OF_2) else _bound(sage, "sageattn", {})


def _variant(wanted: str, capability: tuple[int, int]) -> tuple[str, dict[str, str]] | None:
    """(end of the function's name, options), or None."""
    if wanted == "fp16":
        return None if capability == (8, 6) else ("fp16_cuda", {"pv_accum_dtype": "fp32"})
    if capability == (8, 9) or capability[0] == 12:
        half = half_sums_compiled()
        if wanted == "fp32" and not half:
            return None
        options = {"pv_accum_dtype": "fp32+fp16" if half and wanted == "fast" else "fp32+fp32"}
        if capability[0] == 12:  # Sage's Triton kernels are unusable there: no quantization per thread
            options["qk_quant_gran"] = "per_warp"
        return "fp8_cuda", options
    if wanted == "fp32":
        return None
    others = {
        (8, 0): ("fp16_cuda", {"pv_accum_dtype": "fp32"}),
        (8, 6): ("fp16_triton", dict[str, str]()),
        (9, 0): ("fp8_cuda_sm90", {"pv_accum_dtype": "fp32+fp32"}),
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
        return function(q, k, v, sm_scale=scale, tensor_layout="NHD", is_causal=False, **options)

    return run
