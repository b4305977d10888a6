"""The ways to compute attention that exist, which of them are right on this GPU, and which is fastest.

    out = softmax(q·kᵀ·scale)·v        q (B, L, H, D), k and v (B, S, H, D) of one dtype -> (B, L, H, D)

| name | product in | what |
|---|---|---|
| sage2 | 8 bits | SageAttention 2 (`sage.py`) as this GPU has it: int8 q·kᵀ, fp8 or fp16 probabilities |
| sage2-sm90 | 8 bits | the same on Hopper, by its own kernel: fp8 probabilities, fp32 sums |
| sage2-fp32 | 8 bits | the same with fp32 sums of the second product, where `sage2` takes fp16 ones |
| sage2-fp16 | 8 bits | int8 q·kᵀ and fp16 probabilities, whose range no outlier exceeds so soon |
| sage1 | 8 bits | SageAttention 1 (pure Triton): int8 q·kᵀ, fp16 probabilities |
| hopper-fp8 | 8 bits | our own kernel for Hopper (`hopper_fp8.py`): e4m3, fp32 sums beyond 128 keys |
| cudnn-fp8 | 8 bits | cuDNN's FP8, through nvidia-cudnn-frontend (`cudnn_fp8.py`): e4m3 all through |
| flash3, flash2 | 16 bits | the flash-attn packages, where they are installed |
| sdpa-cudnn, sdpa-flash, sdpa-efficient | 16 bits | torch's kernels |
| sdpa | 16 bits | whichever of them torch chooses; the CPU's |
| sdpa-math | fp32 | the formula, a slice of the scores at a time: the slow twin and the last resort |

An import proves nothing: kernels miss this GPU's architecture, were built for another CUDA, or read beyond
the last key. So a backend counts when `prove` has run it on this GPU, at lengths that are no multiple of any
tile, with NaN behind the last key, and at the length of a video with values that all pull one way, where sums
of few bits lose a third (`one_sided`); and its numbers were those of the twin. Engine and proof compute on
the default stream: on another one Sage is silently wrong (`sage.py`).
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.errors import RequestError, first_line
from runtime.kernels.tune import Timing, in_a_row, time_candidates
from runtime.layers import cudnn_fp8, hopper_fp8, sage
from runtime.layers.attention import Run
from runtime.layers.compact_qk import RunCompact
from runtime.layers.packages import package

PROOF_LENGTHS = (1, 63, 65, 513, 1000)
LONG_PROOF = (128, 32760)  # queries, and the keys of the smallest full video
BOUNDS = {8: 0.06, 16: 0.01, 32: 4e-3}  # relative RMS distance to fp32; rounding out to bf16 alone is .0018
_SCORE_BYTES = 2**28  # of fp32 scores that the twin holds at a time
_HEAD_DIMS_8BIT = (64, 96, 128)
LAST_RESORT = "sdpa-math"  # never left out
TIMED_TOKENS = 30720  # at most, in trials; the smallest full video has 32,760
# Rows of all heads for each multiprocessor: on an H200 20 of 40 heads at the length of a video (150 MiB for
# each 16-bit tensor), 12 ms. Five take 3 ms, little more than the host needs to launch what surrounds an
# attention in 8 bits: a slow host made the faster one the slower.
TIMED_ROWS = 20 * 32768 // 132
_TILE = 64  # fewer queries or keys are none for cuDNN


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        bits: 8, 16 or 32, the precision of its products; sets the bound of its proof and its place among
        rungs. find: (compute capability) -> what runs it there, or None; it may import a package. lowest:
        first compute capability. over: the same for whoever needs q no more, with the result in its memory.
        compact: the same of q and k that come in 8 bits from their norm (`compact_qk.py`), with the result
        in the memory that is named.
    """

    name: str
    bits: int
    find: Callable[[tuple[int, int]], Run | None]
    lowest: tuple[int, int] = (8, 0)
    over: Run | None = None
    compact: RunCompact | None = None


@dataclass(frozen=True)
class Proof:
    """What a trial run showed: the relative RMS distance to fp32, and why not where it is unusable."""

    name: str
    ok: bool
    distance: float = float("nan")
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """The backend in use, how it runs, and what was learned on the way (for `doctor` and the metadata)."""

    name: str
    run: Run
    proofs: tuple[Proof, ...]
    timings: tuple[Timing, ...] = ()


# --- the ways ---


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's attention, by the kernel of its choice."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def math(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The formula in fp32, head by head and a slice of the queries at a time: the slow twin."""
    out = torch.empty_like(q)
    step = max(_SCORE_BYTES // (4 * k.shape[1]), 1)
    for batch in range(q.shape[0]):
        for head in range(q.shape[2]):
            keys = k[batch, :, head].float().t() * scale  # (D, S)
            values = v[batch, :, head].float()  # (S, D)
            for start in range(0, q.shape[1], step):
                scores = q[batch, start : start + step, head].float() @ keys  # (step, S)
                out[batch, start : start + step, head] = scores.softmax(-1) @ values
    return out


def _sdpa_with(kernel: SDPBackend, _capability: tuple[int, int]) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if kernel == SDPBackend.CUDNN_ATTENTION and min(q.shape[1], k.shape[1]) < _TILE:
            return sdpa(q, k, v, scale)
        with sdpa_kernel(kernel):
            return sdpa(q, k, v, scale)

    return run


def _flash(name: str, _capability: tuple[int, int]) -> Run | None:
    function = getattr(package(name), "flash_attn_func", None)
    if function is None:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = function(q, k, v, softmax_scale=scale)
        return out[0] if isinstance(out, tuple) else out  # some versions return the sums too

    return run


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("sage2", 8, partial(sage.find_v2, "fast")),
        Backend("sage2-sm90", 8, partial(sage.find_v2, "sm90"), lowest=(9, 0)),
        Backend("sage2-fp32", 8, partial(sage.find_v2, "fp32")),
        Backend("sage2-fp16", 8, partial(sage.find_v2, "fp16")),
        Backend("sage1", 8, sage.find_v1),
        Backend(
            *("hopper-fp8", 8, hopper_fp8.find, (9, 0)),
            over=hopper_fp8.run_over,
            compact=hopper_fp8.run_compact,
        ),
        Backend("cudnn-fp8", 8, cudnn_fp8.find, lowest=(9, 0), over=cudnn_fp8.run_over),
        Backend("flash3", 16, partial(_flash, "flash_attn_interface"), lowest=(9, 0)),
        Backend("flash2", 16, partial(_flash, "flash_attn")),
        Backend("sdpa-cudnn", 16, partial(_sdpa_with, SDPBackend.CUDNN_ATTENTION)),
        Backend("sdpa-flash", 16, partial(_sdpa_with, SDPBackend.FLASH_ATTENTION)),
        Backend("sdpa-efficient", 16, partial(_sdpa_with, SDPBackend.EFFICIENT_ATTENTION), lowest=(5, 0)),
        Backend("sdpa", 16, lambda _: sdpa, lowest=(0, 0)),
        Backend("sdpa-math", 32, lambda _: math, lowest=(0, 0)),
    )
}


# --- which are right here ---


@contextmanager
def quiet() -> Iterator[None]:
    """For trials: where no kernel of torch's may run, it warns of each; a proof says it in one line.

    Those warnings alone are silenced: they come from the call of torch's attention in this file.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=rf"{__name__.replace('.', '[.]')}$")
        yield


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def available(name: str, device: torch.device) -> Run | None:
    """What runs this backend on `device`, by import and capability alone; None where it is missing."""
    backend = BACKENDS[name]
    capability = capability_of(device)
    return backend.find(capability) if capability >= backend.lowest else None


def inputs(
    length: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (1, length, heads, head_dim), k and v (1, keys, ...) with NaN behind the last row of each.

    Keys have a common part and a few large channels, as the model's have.
    """
    generator = torch.Generator(device).manual_seed(length + 7 * keys)

    def rows(count: int) -> Tensor:
        room = torch.full((1, count + 128, heads, head_dim), float("nan"), dtype=dtype, device=device)
        x = room[:, :count]
        for head in range(heads):  # one at a time: at full length the memory is the engine's
            x[:, :, head] = torch.randn((1, count, head_dim), dtype=dtype, device=device, generator=generator)
        return x

    q, k, v = rows(length), rows(keys), rows(keys)
    k[..., :: max(head_dim // 8, 1)] += 2.0
    v += 0.5
    return q, k, v


def one_sided(
    length: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """As `inputs`: half of the keys have one value and half its opposite, and a query looks at one half.

    So that every term of its sum has the same sign, as where half of a picture is sky. What an accumulator of
    few bits cuts off at each of thousands of terms is then missing: cuDNN's FP8 on Hopper loses 29 %.
    """
    generator = torch.Generator(device).manual_seed(keys)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def sides(count: int) -> Tensor:
        return noise(count, 1, 1).sign()

    direction, value, side = noise(heads, head_dim), noise(heads, head_dim), sides(keys)
    q = (2 * sides(length) * direction + 0.1 * noise(length, heads, head_dim))[None]
    k = (side * direction + 0.1 * noise(keys, heads, head_dim))[None]
    v = (side * value + 0.1 * noise(keys, heads, head_dim))[None]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def prove(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> Proof:
    """Run a backend at small and odd lengths against `sdpa-math` in fp32: finite and close, or why not.

    Each length attends to itself and to 512 keys, and a few queries to a video's (`one_sided`). The bound is
    that of the backend's precision.
    """
    return _prove(name, available(name, device), device, dtype, head_dim)


def _prove(name: str, run: Run | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> Proof:
    bits = BACKENDS[name].bits
    if run is None:
        return Proof(name, False, reason="not installed, or not for this GPU")
    if bits == 8 and head_dim not in _HEAD_DIMS_8BIT:
        return Proof(name, False, reason=f"takes heads of {_HEAD_DIMS_8BIT}, not {head_dim}")
    if bits < 32 and dtype == torch.float32 and device.type == "cuda":
        return Proof(name, False, reason="takes 16-bit numbers only")
    worst = 0.0
    for length, keys, make in _cases():
        q, k, v = make(length, keys, 3, head_dim, dtype, device)
        try:
            with quiet():
                out = run(q, k, v, head_dim**-0.5)
            distance = _distance(out, math(q.float(), k.float(), v.float(), head_dim**-0.5))
        # A missing kernel is an assertion here, a CUDA error or an unsupported shape there.
        except Exception as error:  # noqa: BLE001
            reason = f"{length} on {keys} keys: {type(error).__name__}: {first_line(error)}"
            return Proof(name, False, worst, reason)
        if not distance <= BOUNDS[bits]:  # NaN is above any bound
            text = f"{length} on {keys} keys: {distance:.3f} from fp32, expected {BOUNDS[bits]} at most"
            return Proof(name, False, distance, text)
        worst = max(worst, distance)
    return Proof(name, True, worst)


def _cases() -> Iterator[tuple[int, int, Callable[..., tuple[Tensor, Tensor, Tensor]]]]:
    """(queries, keys, what makes the inputs) of a proof."""
    for length in PROOF_LENGTHS:
        for keys in sorted({length, 512}):
            yield length, keys, inputs
    yield *LONG_PROOF, one_sided


def _distance(out: Tensor, expected: Tensor) -> float:
    """Relative RMS distance; infinite where the shape is another."""
    if out.shape != expected.shape:
        return float("inf")
    return float((out.float() - expected).norm() / expected.norm())


@cache
def proofs(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Proof, ...]:
    """Every backend's proof on `device`, once per process: the table that `doctor` shows."""
    return tuple(prove(name, device, dtype, head_dim) for name in BACKENDS)


# --- which to take ---


def choose(
    device: torch.device,
    tokens: int,
    keys: int | None = None,
    heads: int = 40,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    forced: str | None = None,
    *,
    avoided: Collection[str] = (),
) -> Choice:
    """The fastest proven backend for `tokens` queries on `keys` keys (the same tokens unless given).

    Timed on `device` with random inputs, once per process and size; on a CPU it is torch's own. Of longer
    lengths TIMED_TOKENS are timed, and of many heads some (`timed_heads`): what is fastest there is taken for
    what is fastest, and no time of all heads is claimed. The length must be about the real one: what an 8-bit
    backend does once for each token weighs four times as much at 8,192 tokens, and there cuDNN's lost to
    torch's on the H200 (3.4 against 2.0 ms) that it beats at 32,760 (27.4 against 38.4).
    Few keys (`few_keys`) leave 8 bits out. forced: this backend and no other ("auto" is None). avoided: names
    that are left out, but for the last resort.
    Raises RequestError for an unknown name and for one that does not work here, with what its trial showed.
    """
    if forced in (None, "auto"):
        keys = tokens if keys is None else keys
        timed = (min(tokens, TIMED_TOKENS), min(keys, TIMED_TOKENS))
        some = timed_heads(timed[0], heads, device)
        return _fastest(device, *timed, some, head_dim, dtype, frozenset(avoided))
    check_name(forced)
    proof = prove(forced, device, dtype, head_dim)
    run = available(forced, device)
    if not proof.ok or run is None:
        raise RequestError(f"attention {forced!r} does not work here ({proof.reason}): use --attention auto")
    return Choice(forced, run, (proof,))


def check_name(name: str) -> None:
    """Raise RequestError for a name that no backend has; "auto" is one to ask for."""
    if name != "auto" and name not in BACKENDS:
        raise RequestError(f"attention {name!r} is unknown, expected auto or one of {', '.join(BACKENDS)}")


def timed_heads(tokens: int, heads: int, device: torch.device) -> int:
    """How many of `heads` heads are timed at a length: as many as keep the GPU busy for a while."""
    if device.type != "cuda":
        return 1
    rows = TIMED_ROWS * processors_of(device)
    return max(1, min(heads, rows // max(tokens, 1)))


def few_keys(tokens: int, keys: int) -> bool:
    """Cross attention has so few keys that 8 bits gain nothing and lose precision."""
    return keys <= 1024 < tokens


def admitted(found: Sequence[Proof], avoided: Collection[str], tokens: int, keys: int) -> list[str]:
    """Names of the proven backends that may be chosen, in the order of `found`; [] for the last resort."""
    least_bits = 16 if few_keys(tokens, keys) else 8
    names = [proof.name for proof in found if proof.ok and proof.name not in {*avoided, LAST_RESORT}]
    return [name for name in names if BACKENDS[name].bits >= least_bits]


def without(found: Sequence[Proof], avoided: Collection[str]) -> tuple[Proof, ...]:
    """The proofs, those of avoided backends (but for the last resort) turned into refusals."""
    refused = {*avoided} - {LAST_RESORT}
    return tuple(
        replace(proof, ok=False, reason="gave wrong numbers here before")
        if proof.ok and proof.name in refused
        else proof
        for proof in found
    )


@cache
def _fastest(
    device: torch.device,
    tokens: int,
    keys: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    avoided: frozenset[str],
) -> Choice:
    found = without(proofs(device, dtype, head_dim), avoided)
    names = admitted(found, avoided, tokens, keys)
    if device.type != "cuda" or not names:
        name = "sdpa" if "sdpa" in names else LAST_RESORT
        return Choice(name, _must(name, device), found)
    q, k, v = inputs(tokens, keys, heads, head_dim, dtype, device)
    scale = head_dim**-0.5
    runs = {n: partial(_must(n, device), q, k, v, scale) for n in names}
    with quiet():
        timings = time_candidates(runs, repeats=3, clock=in_a_row)
    best = next((timing.name for timing in timings if timing.milliseconds is not None), LAST_RESORT)
    return Choice(best, _must(best, device), found, tuple(timings))


def rungs(choice: Choice, device: torch.device) -> list[str]:
    """`choice` and what to fall back to when its numbers are wrong, safer from rung to rung.

    8-bit backends after an 8-bit one only with safer sums, then the fastest of the 16-bit ones that were
    proven, then `sdpa-math`.
    """
    proven = {proof.name for proof in choice.proofs if proof.ok} or {choice.name}
    if not choice.timings:  # forced, or a CPU: what else is right here is not known yet
        known = {proof.name for proof in choice.proofs}
        proven |= {name for name in ("sdpa", LAST_RESORT) if name not in known and available(name, device)}
    order = [timing.name for timing in choice.timings if timing.milliseconds is not None]
    order += [name for name in BACKENDS if name not in order]
    bits = BACKENDS[choice.name].bits
    ladder = [choice.name]
    if bits == 8:
        ladder += [name for name in ("sage2-fp32", "sage2-fp16") if name in proven and name != choice.name]
    if bits <= 16:
        ladder += [
            name for name in order if name in proven and BACKENDS[name].bits == 16 and name != choice.name
        ][:1]
    return ladder if LAST_RESORT in ladder else [*ladder, LAST_RESORT]


def named(name: str, device: torch.device) -> Run:
    """What runs a rung. Raises RequestError for a backend that is missing on this device."""
    run = available(name, device) if name in BACKENDS else None
    if run is None:
        raise RequestError(f"attention {name!r} is not available here: use --attention auto")
    return run


def _must(name: str, device: torch.device) -> Run:
    run = available(name, device)
    assert run is not None  # it was proven here
    return run
