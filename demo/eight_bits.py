"""What GPUs compute in eight bits, in plain torch on any machine: to see what it does to a video.

    attention   SageAttention 2, cuDNN's FP8 and our own for Hopper: their rounding, and Sage's sums; cuDNN's
                keep 14 bits on Hopper, which few keys do not show (`backends.one_sided`)
    products    the sums of FP8 tensor cores, which keep 14 bits

They round where the kernels round; they are not the kernels, whose numbers only a card tells
(tests/gpu/measure_quality.py). Where a kernel rounds in smaller groups than are written here, it is closer.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from runtime.kernels.attention_in_columns import attend_torch
from runtime.kernels.attention_quantize import quantize_by_sample, values_by_sample
from runtime.kernels.launch import E4M3
from runtime.layers import backends, cudnn_fp8
from runtime.layers.compact_qk import QKScales, RunCompact
from runtime.linear import Fp8Linear
from runtime.linear.module import rescale

Run = Callable[[Tensor, Tensor, Tensor, float], Tensor]

Q_ROWS, K_ROWS = (
    32,
    64,
)  # tokens that share a scale; in SageAttention 2 fewer do (arXiv 2411.10958)
KEYS = 32  # of one instruction of the second product
FLUSH = 64  # keys whose sum is 16-bit before it joins the one in fp32
E4M3_TOP, HALF_TOP = 448.0, 2.25  # largest entry of v: with 2.25, 448 · 2.25 · 64 = 64,512 fits fp16


def sage(q: Tensor, k: Tensor, v: Tensor, scale: float, values: str = "fp8") -> Tensor:
    """SageAttention 2: q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D) in q's dtype.

    s = q8·kᵀ8·a·b, int8, by the largest entry of 32 queries and of 64 keys, which lose their mean before;
    p = exp(s - max) in e4m3 after 448; v in e4m3 by channel; the sum of p is that of the unrounded ones.
    values: "fp8" (fp32 sums), "fp8, fp16 sums" (64 keys at a time) or "fp16" (p and v, fp32 sums).
    """
    q_, k_, v_ = (x.bfloat16().float().transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    q8, q_scale = _int8_groups(q_, Q_ROWS)
    k8, k_scale = _int8_groups(k_ - k_.mean(2, keepdim=True), K_ROWS)
    scores = (q8 @ k8.transpose(-1, -2)) * q_scale * k_scale.transpose(-1, -2) * scale  # exact: below 2^24
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    if values == "fp16":
        out = weights.half().float() @ v_.half().float()
    else:
        top = HALF_TOP if values == "fp8, fp16 sums" else E4M3_TOP
        by = v_.abs().amax(2, keepdim=True).clamp_min(1e-12) / top  # (B, H, 1, D)
        v8, p8 = (v_ / by).to(E4M3).float(), (weights * E4M3_TOP).to(E4M3).float()
        out = (_half_sums(p8, v8) if top == HALF_TOP else p8 @ v8) * by / E4M3_TOP
    return (out / total).transpose(1, 2).bfloat16().to(q.dtype)


def _int8_groups(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x (B, H, L, D) as whole numbers in -127..127, and the scale of each token (B, H, L, 1)."""
    largest = x.abs().amax(-1, keepdim=True)  # (B, H, L, 1)
    scale = torch.cat([part.amax(2, keepdim=True).expand_as(part) for part in largest.split(rows, 2)], 2)
    scale = scale.clamp_min(1e-12) / 127
    return (x / scale).round(), scale


def _half_sums(p8: Tensor, v8: Tensor) -> Tensor:
    """p8 (B, H, L, S) @ v8 (B, H, S, D): sums of 64 keys in fp16, rounded after each 32, then fp32."""
    out = torch.zeros((*p8.shape[:-1], v8.shape[-1]), device=p8.device)
    for p_some, v_some in zip(p8.split(FLUSH, -1), v8.split(FLUSH, 2), strict=True):
        half = torch.zeros_like(out)
        for p_part, v_part in zip(p_some.split(KEYS, -1), v_some.split(KEYS, 2), strict=True):
            half = (half + p_part @ v_part).half().float()
        out += half
    return out


def cudnn_product(
    q: Tensor, k: Tensor, v: Tensor, descale: Tensor, scale: float, wanted: torch.dtype
) -> Tensor:
    """What cuDNN computes between the passes of `cudnn_fp8`: weights in e4m3, scaled by 256; fp32 sums."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    scores = q @ k.transpose(-1, -2) * descale * scale
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = (weights * 256).to(E4M3).float() / 256 @ v / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(wanted)


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """cuDNN's FP8 attention as on Hopper, where it writes e4m3; shapes as for `sage`."""

    def in_e4m3(q: Tensor, k: Tensor, v: Tensor, descale: Tensor, scale: float, _: torch.dtype) -> Tensor:
        return cudnn_product(q, k, v, descale, scale, E4M3)

    return cudnn_fp8.through(in_e4m3, q.bfloat16(), k.bfloat16(), v.bfloat16(), scale).to(q.dtype)


def hopper(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Our FP8 attention for Hopper; shapes as for `sage`."""
    outs = []
    for one in zip(*(x.bfloat16().split(1) for x in (q, k, v)), strict=True):
        given = quantize_by_sample(*one)
        rest = (given.v, given.descale, given.factor, given.center, scale)
        outs.append(attend_torch(given.q[0], given.k[0], *rest).bfloat16())
    return torch.stack(outs).to(q.dtype)


def hopper_compact(
    q8: Tensor, k8: Tensor, v: Tensor, scales: QKScales, scale: float, out: Tensor | None = None
) -> Tensor:
    """The same of compact queries and keys, as in a run (`hopper_fp8.run_compact`)."""
    outs = []
    for q, k, values in zip(q8, k8, v.bfloat16().split(1), strict=True):
        made = attend_torch(q, k, *_in_columns(values, scales), scale)
        outs.append(made.bfloat16().to(v.dtype))
    return torch.stack(outs) if out is None else out.copy_(torch.stack(outs))


def _in_columns(v: Tensor, scales: QKScales) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns, factor, center = values_by_sample(v)
    return columns, scales.levels.descale, factor, center


def one_scale_each(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """FP8 attention without care: each tensor by its largest entry. Only to see what care is worth."""
    scales = [x.float().abs().amax() / E4M3_TOP for x in (q, k, v)]
    q8, k8, v8 = ((x.float() / s).to(E4M3) for x, s in zip((q, k, v), scales, strict=True))
    out = cudnn_product(q8, k8, v8, scales[0] * scales[1], scale, E4M3).float()
    return (out * scales[2]).to(q.dtype)


TWINS: dict[str, Run] = {
    "sage2": partial(sage, values="fp8, fp16 sums"),
    "sage2-fp32": partial(sage, values="fp8"),
    "sage2-fp16": partial(sage, values="fp16"),
    "hopper-fp8": hopper,
    "cudnn-fp8": cudnn,
    "sdpa": backends.sdpa,
    "sdpa-math": backends.math,
}
"""What stands on a CPU for the backend of this name; `sage2` with the fp16 sums of sm_89 and sm_120."""

COMPACT_TWINS: dict[str, RunCompact] = {"hopper-fp8": hopper_compact}
"""The same for backends that take compact queries and keys."""

# --- sums of 14 bits ---

TERMS = 32  # products of one instruction, and the sum so far: all cut to the largest exponent among them
FRACTION = 13  # bits behind the leading one
PROMOTED = 128  # products after which a sum joins one in fp32, without fast accumulation
_ROOM = 2**20  # products at a time: what a core keeps near itself


def tensor_core_sums(
    q: Tensor, weight: Tensor, fraction: int = FRACTION, promoted: int | None = None
) -> Tensor:
    """q (M, K) @ weight (N, K)ᵀ of e4m3 numbers as Hopper adds them -> (M, N) fp32.

    Of 32 products and the sum so far, each is cut (towards zero) to multiples of 2^(e - fraction), e the
    largest exponent of the 33; so is their sum. `promoted`: after so many products the sum moves to one in
    fp32 and begins again, which is `use_fast_accum=False`; None is True. With 13 bits the relative RMS error
    of 13,824 products of normal numbers is 2.8e-3 and 1.3e-4, as an H200 has it.
    """
    depth = q.shape[1]
    q_, weight_ = q.float(), weight.float()
    rows = max(_ROOM // (weight.shape[0] * TERMS), 1)
    out = torch.empty((q.shape[0], weight.shape[0]), device=q.device)
    for start in range(0, q.shape[0], rows):
        some = q_[start : start + rows]
        total = torch.zeros((len(some), weight.shape[0]), device=q.device)
        running = torch.zeros_like(total)
        for first in range(0, depth, TERMS):
            terms = slice(first, first + TERMS)
            products = some[:, None, terms] * weight_[None, :, terms]  # (rows, N, 32)
            largest = torch.maximum(products.abs().amax(-1), running.abs())
            step = _step_of(largest, fraction)
            cut = products.mul_((1 / step)[..., None]).trunc_().sum(-1) + (running / step).trunc()
            running = cut * step
            again = _step_of(running.abs(), fraction)  # the sum may have grown by an exponent
            running = (running / again).trunc() * again
            if promoted is not None and (first + TERMS) % promoted == 0:
                total += running
                running = torch.zeros_like(running)
        out[start : start + rows] = total + running
    return out


def _step_of(largest: Tensor, fraction: int) -> Tensor:
    """2^(e - fraction), e the exponent of each of `largest` (of what is next to nothing, a tiny one)."""
    exponent = torch.frexp(largest.clamp_min(2.0**-60))[1] - 1
    return torch.ldexp(torch.ones_like(largest), exponent - fraction)


class TensorCoreLinear(Fp8Linear):
    """An Fp8Linear on the CPU whose sums are those of `tensor_core_sums`."""

    fraction = FRACTION
    promoted: int | None = None

    def _reference(self, q: Tensor, scale: Tensor) -> Tensor:
        sums = tensor_core_sums(q, self.weight, self.fraction, self.promoted)
        return rescale(sums, scale, self.weight_scale, self.bias)


def use_tensor_core_sums(model: nn.Module, fraction: int = FRACTION, promoted: int | None = None) -> int:
    """Make every Fp8Linear of `model` sum so, on its own tensors; returns how many there are."""
    linears = [(name, one) for name, one in model.named_modules() if isinstance(one, Fp8Linear)]
    for name, linear in linears:
        other = TensorCoreLinear(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        other.weight, other.weight_scale, other.bias = linear.weight, linear.weight_scale, linear.bias
        other.fraction, other.promoted = fraction, promoted
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, other)
    return len(linears)
