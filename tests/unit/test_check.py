"""What must never leave the engine: latents or frames that are not finite, or flat."""

import numpy as np
import pytest
import torch

from runtime.check import check_decoded, check_frames, check_latents
from runtime.errors import OutputCheckError


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_good_latents_and_frames_pass() -> None:
    check_latents(noise(1, 16, 2, 4, 4), 1, 4)
    check_decoded(noise(1, 3, 4, 8, 8), 0)
    check_frames((noise(4, 8, 8, 3).clamp(-1, 1) * 127 + 128).to(torch.uint8).numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found_and_placed(value: float) -> None:
    latents = noise(1, 16, 2, 4, 4)
    latents[0, 3, 1, 2, 2] = value
    with pytest.raises(OutputCheckError, match=r"1 of 512 latent values after denoise step 3 of 4"):
        check_latents(latents, 3, 4)
    frames = noise(1, 3, 4, 8, 8)
    frames[0, 0, 3, 7, 7] = value
    with pytest.raises(OutputCheckError, match="frame 5"):
        check_decoded(frames, 5)


@pytest.mark.parametrize("level", [0.0, 3.5])
def test_flat_latents_are_refused(level: float) -> None:
    with pytest.raises(OutputCheckError, match="flat"):
        check_latents(torch.full((1, 16, 2, 4, 4), level) + 1e-4 * noise(1, 16, 2, 4, 4), 4, 4)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_video_of_one_colour_is_refused(level: int) -> None:
    frames = np.full((5, 16, 16, 3), level, np.uint8)
    with pytest.raises(OutputCheckError, match="flat"):
        check_frames(frames)
    frames[:, :4, :4] = (level + 100) % 256  # a small object is a picture
    check_frames(frames)
