"""The last look before a result leaves the engine: no NaN, no black or flat video (exit 6)."""

import math

import numpy as np
import torch
from torch import Tensor

from runtime.errors import OutputCheckError

MIN_LATENT_STD = 1e-2  # states of the sampler have a deviation near 1; a dead model gives exactly 0
MIN_FRAME_STD = 0.5  # in 8-bit levels over the whole video


def check_latents(latents: Tensor, step: int, steps: int) -> None:
    """Refuse latents (any shape) after step `step` that are not finite or do not vary."""
    where = f"after denoise step {step} of {steps}"
    finite = torch.isfinite(latents)
    if not bool(finite.all()):
        bad = latents.numel() - int(finite.sum())
        raise OutputCheckError(
            f"{bad} of {latents.numel()} latent values {where} are not finite, so the video would be black "
            "or noise: run it again with another model variant or with --device cpu, to see whether the "
            "weights or the GPU are at fault."
        )
    deviation = float(latents.float().std())
    if deviation < MIN_LATENT_STD:
        raise OutputCheckError(
            f"The latents {where} are flat (standard deviation {deviation:.1e}, expected about 1), so the "
            "video would be one colour: check the weights, then the prompt."
        )


def check_decoded(frames: Tensor, first_frame: int) -> None:
    """Refuse decoded frames (float, any layout) that are not finite; `first_frame` is the first's number."""
    if not bool(torch.isfinite(frames).all()):
        raise OutputCheckError(
            f"The decoded pixels from frame {first_frame} on are not finite, although the latents are good: "
            "decode them again with --device cpu, or with a profile whose vae.dtype is fp32."
        )


def check_frames(frames: np.ndarray) -> None:
    """Refuse a video, uint8 (F, H, W, 3), of one flat colour."""
    total = squares = 0
    for frame in frames:  # in integers, frame by frame: a copy in float64 would be 24 bytes for each pixel
        total += int(frame.sum(dtype=np.int64))
        squares += int(np.square(frame, dtype=np.uint16).sum(dtype=np.int64))
    deviation = math.sqrt(max(squares / frames.size - (total / frames.size) ** 2, 0))
    if deviation < MIN_FRAME_STD:
        raise OutputCheckError(
            f"The video is one flat colour (standard deviation {deviation:.2f} of 255 levels, expected "
            "several): check the VAE file, then the prompt."
        )
