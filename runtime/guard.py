"""What must be true of every result, whatever computed it: the guard of steps and frames (docs/guard.md).

After each denoise step one small tensor of numbers is made on the device and read once, when the latents come
to the CPU anyway. With x the latents before the step, v the velocity and sigma the noise level,

    clean = x - sigma·v        what the step takes for the picture
    noise = x + (1 - sigma)·v  what it takes for the noise

A flow model's v is about noise - picture, so `noise` has a deviation of 1 and has nothing of the picture in
it, in every tile of tokens. How nearly is measured for a model and stands in its manifest (`Envelope`); a
model without such numbers has `WIDE`, which random weights pass.

Attention and kernels are checked on the run's own data, row by row: `runtime/samples.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.errors import OutputCheckError
from runtime.schema import Envelope

WIDE = Envelope(velocity=(0.05, 10.0), clean=(0.05, 10.0), noise=(0.02, 20.0), leak=1.01)
"""For a model that nobody has measured. Random weights: velocity 0.55 to 1.3, clean 0.8 to 1.6."""
TILE_TOKENS = 64  # rows of the smallest tile that a kernel writes
REPEATS = (1, 2, 16, 32, 64, 128, 256)  # tokens from a row to the one that it must not equal
MIN_LATENT_STD = 1e-2  # states of the sampler have a deviation near 1; a dead model gives exactly 0

MIN_FRAME_STD = 0.5  # in 8-bit levels
MIN_CUT = 16.0  # levels that the picture must jump by, on average, into a frame that should not be flat
MIN_CHANGE = 0.05  # relative: latents that differ by more cannot decode to the same bytes


@dataclass(frozen=True)
class Fault:
    """What is wrong, as part of a sentence.

    origin: "attention" or "kernels", where sampled rows show that these are to blame.
    """

    reason: str
    origin: str = ""

    def __str__(self) -> str:
        return self.reason


# ------------------------------------------------------------------------------------------------------ steps


@dataclass(frozen=True)
class Numbers:
    """What a step's velocity and latents are told by; deviations, over all or the least and largest tile."""

    bad_velocity: float
    bad_latents: float
    velocity: float
    latents: float
    clean: float
    least_tile: float  # of the velocity
    noise_low: float
    noise_high: float
    leak: float  # the largest |correlation| of clean and noise in a tile
    repeats: float


def measure(velocity: Tensor, before: Tensor, after: Tensor, sigma: float) -> Tensor:
    """The fields of `Numbers`, (10,) fp32 on the device: nothing waits for them.

    All are (1, C, T, h, w), h and w even.
    """
    v = _tokens(velocity[0].float())  # (L, C·4)
    x = _tokens(before[0].float())
    clean, noise = _tiles(x - sigma * v), _tiles(x + (1 - sigma) * v)  # (tiles, numbers)
    deviations = _deviation(noise)
    apart = ((clean - clean.mean(1, keepdim=True)) * (noise - noise.mean(1, keepdim=True))).mean(1)
    leak = apart.abs() / (_deviation(clean) * deviations).clamp_min(1e-30)
    frame = (before.shape[-1] // 2) * (before.shape[-2] // 2)
    steps = sorted({step for step in (*REPEATS, before.shape[-1] // 2, frame) if 0 < step < len(v)})
    equal = [(v[step:] == v[:-step]).all(1).sum() for step in steps]
    numbers = [
        (~torch.isfinite(v)).sum(),
        (~torch.isfinite(after)).sum(),
        _deviation(v.flatten()),
        _deviation(after.float().flatten()),
        _deviation((x - sigma * v).flatten()),
        _deviation(_tiles(v)).min(),
        deviations.min(),
        deviations.max(),
        leak.max(),
        torch.stack(equal).sum() if equal else torch.zeros((), device=v.device),
    ]
    return torch.stack([number.float() for number in numbers])


def _deviation(x: Tensor) -> Tensor:
    return x.std(dim=-1, correction=0)


def _tokens(x: Tensor) -> Tensor:
    """Latents (C, T, h, w) as the rows that the kernels work on: (T·h/2·w/2, C·4)."""
    patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (C, T, h/2, 2, w/2, 2)
    return patches.permute(1, 2, 4, 0, 3, 5).flatten(0, 2).flatten(1)


def _tiles(rows: Tensor) -> Tensor:
    """Rows (L, N), TILE_TOKENS at a time, the last so many once more: (tiles, numbers of a tile)."""
    last = rows[-TILE_TOKENS:].reshape(1, -1)
    whole = len(rows) // TILE_TOKENS
    if not whole:
        return last
    return torch.cat([rows[: whole * TILE_TOKENS].reshape(whole, -1), last])


Samples = Sequence[Sequence[float]]
"""(distance, whether what it is measured by is not finite) for each, in the order of the computation."""


def judge(
    numbers: Sequence[float],
    envelope: Envelope | None = None,
    attention: Samples = (),
    attention_bound: float = 0.0,
    kernels: Samples = (),
    kernel_bound: float = 0.0,
) -> Fault | None:
    """What is wrong with a step, of the numbers of `measure` and of `runtime.samples`. None: nothing."""
    for origin, samples, bound in (
        ("attention", attention, attention_bound),
        ("kernels", kernels, kernel_bound),
    ):
        for number, (distance, broken) in enumerate(samples, start=1):
            if broken:
                break  # what comes after has seen what is not finite
            if not distance <= bound:
                what = "attention" if origin == "attention" else "what fused kernels made"
                where = f"sample {number} of {len(samples)}"
                far = f"{distance:.2g} from the formula, expected at most {bound:.2g}"
                return Fault(f"{what} is {far}, in {where}", origin)
    found, wanted = Numbers(*numbers), envelope or WIDE
    for what, bad in (("velocity", found.bad_velocity), ("latents", found.bad_latents)):
        if bad:
            return Fault(f"{int(bad)} numbers of the {what} are not finite")
    if found.latents < MIN_LATENT_STD:
        return Fault(f"the latents are flat (standard deviation {found.latents:.1e}, expected about 1)")
    if found.repeats:
        return Fault(f"{int(found.repeats)} pieces of the velocity repeat their neighbours bit for bit")
    ranges = {
        "velocity's standard deviation": (found.velocity, wanted.velocity),
        "least standard deviation of the velocity in a tile": (
            found.least_tile,
            (wanted.velocity[0] / 4, math.inf),
        ),
        "picture's standard deviation": (found.clean, wanted.clean),
        "noise's least standard deviation in a tile": (found.noise_low, (wanted.noise[0], math.inf)),
        "noise's largest standard deviation in a tile": (found.noise_high, (0, wanted.noise[1])),
        "correlation of picture and noise in a tile": (found.leak, (0, wanted.leak)),
    }
    for what, (value, (low, high)) in ranges.items():
        if not low <= value <= high:
            expected = f"at most {high:g}" if low == 0 else f"{low:g} or more"
            expected = expected if low == 0 or math.isinf(high) else f"{low:g} to {high:g}"
            return Fault(f"the {what} is {value:.3g}, expected {expected}")
    return None


# ----------------------------------------------------------------------------------------------------- frames


def check_decoded(frames: Tensor, first_frame: int) -> None:
    """Refuse decoded frames (float, any layout) that are not finite; `first_frame` is the first's number."""
    if not bool(torch.isfinite(frames).all()):
        raise OutputCheckError(
            f"The decoded pixels from frame {first_frame} on are not finite, although the latents are good: "
            "decode them again with --device cpu, or with a profile whose vae.dtype is fp32."
        )


def check_frames(frames: np.ndarray, latents: Tensor | None = None) -> None:
    """Refuse a video, uint8 (F, H, W, 3), that no right decode of its latents (1, 16, T, h, w) gives.

    One flat colour; and where the latents are known: flat frames between others, and frames of a latent frame
    that are byte for byte those of the one before. Stillness and fades are neither: a still scene's latents
    hardly differ, and a fade comes by degrees.
    """
    _check_colour(frames)
    if latents is not None:
        _check_single_frames(frames, latents[0].float().cpu())
        _check_repeats(frames, latents[0].float().cpu())


def _check_colour(frames: np.ndarray) -> None:
    """The sum of squared deviations from the mean only grows with more numbers, whatever they are. So the
    first frames alone prove that a video varies, and only one that is nearly flat is looked at whole.
    """
    total = squares = seen = 0
    spread = 0.0
    for frame in frames:  # in integers, frame by frame: a copy in float64 would be 24 bytes for each pixel
        total += int(frame.sum(dtype=np.int64))
        squares += int(np.square(frame, dtype=np.uint16).sum(dtype=np.int64))
        seen += frame.size
        spread = squares - total**2 / seen
        if spread >= MIN_FRAME_STD**2 * frames.size:
            return
    deviation = math.sqrt(max(spread / frames.size, 0))
    raise OutputCheckError(
        f"The video is one flat colour (standard deviation {deviation:.2f} of 255 levels, expected "
        "several): check the VAE file, then the prompt."
    )


def _check_single_frames(frames: np.ndarray, latents: Tensor) -> None:
    """Flat frames into which the picture jumps, while their latents (16, T, h, w) vary like the others'."""
    flat = [_is_flat(frame) for frame in frames]
    texture = latents.std(dim=(2, 3)).mean(0)  # (T,)
    first = 0
    while first < len(flat):
        last = first
        while last + 1 < len(flat) and flat[last + 1] == flat[first]:
            last += 1
        edges = [(first - 1, first)] * (first > 0) + [(last, last + 1)] * (last + 1 < len(flat))
        jumps = [_change(frames[a], frames[b]) for a, b in edges] if flat[first] else []
        of_run = texture[_latent_frame(first) : _latent_frame(last) + 1]
        if jumps and min(jumps) >= MIN_CUT and float(of_run.max()) >= 0.5 * float(texture.median()):
            which = f"Frame {first} is" if first == last else f"Frames {first} to {last} are"
            raise OutputCheckError(
                f"{which} one flat colour between others, although the latents vary there as elsewhere: "
                "decode them again with --device cpu."
            )
        first = last + 1


def _check_repeats(frames: np.ndarray, latents: Tensor) -> None:
    """Frames of a latent frame that equal those of the one before, while the two differ."""
    for number in range(2, latents.shape[1]):
        start, size = 4 * number - 3, 4
        now, before = frames[start : start + size], frames[start - size : start]
        if len(now) < size or not np.array_equal(now[:, ::8, ::8], before[:, ::8, ::8]):
            continue
        if all(_is_flat(frame) for frame in now):
            continue  # black is black, whatever exceeds it in the latents
        z, past = latents[:, number], latents[:, number - 1]
        if np.array_equal(now, before) and float((z - past).norm()) > MIN_CHANGE * float(z.norm()):
            raise OutputCheckError(
                f"Frames {start} to {start + size - 1} repeat the {size} before them byte for byte, although "
                "their latents differ: decode them again with --device cpu."
            )


def _latent_frame(frame: int) -> int:
    """The latent frame that a frame comes from: the first by itself, then four from each."""
    return (frame + 3) // 4


def _is_flat(frame: np.ndarray) -> bool:
    return bool(frame[::8, ::8].std() < MIN_FRAME_STD) and bool(frame.std() < MIN_FRAME_STD)


def _change(frame: np.ndarray, following: np.ndarray) -> float:
    """Mean absolute difference in levels."""
    return float(np.abs(frame.astype(np.int16) - following).mean())
