"""The decode into bytes: the same as frame by frame, checked, and no mode left switched on."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from runtime import frames
from runtime.errors import OutputCheckError
from runtime.frames import Decoding, frames_to_bytes
from runtime.layers.tiles import WHOLE, Rung
from runtime.vae import VAE, VAEConfig
from runtime.vae_tiles import Piece, decode_pieces
from runtime.video import frames_to_uint8
from tests.unit.test_vae import random_vae

LATENTS = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vae() -> VAE:
    return random_vae(VAEConfig(base_dim=4)).requires_grad_(False)


@pytest.mark.parametrize("rung", [WHOLE, Rung("2x2", 0, 2, 2)], ids=lambda rung: rung.name)
def test_the_bytes_are_those_of_the_slow_twin(vae: VAE, rung: Rung) -> None:
    decoding = Decoding(vae, LATENTS, rung)
    assert [*decoding] == [*range(1, decoding.pieces + 1)]
    expected = frames_to_uint8(vae.decode(LATENTS)[0])
    difference = np.abs(decoding.frames.astype(int) - expected).max()
    print(f"{rung.name}: max diff {difference} of 255 levels")  # a value on the edge between two levels
    assert difference <= 1 and (decoding.frames != expected).mean() < 1e-3
    assert decoding.nbytes == expected.nbytes and expected.std() > 10


def test_whoever_takes_a_piece_is_not_in_inference_mode(vae: VAE) -> None:
    seen = []
    for _ in Decoding(vae, LATENTS):
        seen.append(torch.is_inference_mode_enabled())
        weight = torch.ones(2, requires_grad=True)
        (weight * weight).sum().backward()
        assert weight.grad is not None
    assert seen == [False] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bytes_are_rounded_as_the_video_rounds(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, 2, 31, 40, generator=generator).mul(0.7).to(dtype)
    halves = (torch.arange(256).add(0.5) / 127.5 - 1).to(dtype)  # between two levels
    values.view(-1)[: len(halves)] = halves
    given = values.clone()
    assert (frames_to_bytes(values).numpy() == frames_to_uint8(values)).all()
    assert torch.equal(values, given)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_not_finite_is_refused(
    vae: VAE, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def pieces(*args: VAE) -> Iterator[Piece]:
        for piece in decode_pieces(*args):
            if piece.first == 5:
                piece.frames[0, 1, 2, 3, 4] = value
            yield piece

    monkeypatch.setattr(frames, "decode_pieces", pieces)
    decoding = iter(Decoding(vae, LATENTS))
    assert [next(decoding), next(decoding)] == [1, 2]
    with pytest.raises(OutputCheckError, match="from frame 5 on are not finite"):
        next(decoding)


@pytest.mark.parametrize("rung", [WHOLE, Rung("2x2", 0, 2, 2)], ids=lambda rung: rung.name)
def test_frames_that_are_whole_change_no_more(vae: VAE, rung: Rung) -> None:
    """A picture at once: with every piece. Tiles: while the last one goes through time."""
    decoding, seen = Decoding(vae, LATENTS, rung), []
    for _ in decoding:
        seen.append(decoding.frames[: decoding.whole].copy())
    last = [1, 5, 9]
    assert [len(there) for there in seen] == [0] * (decoding.pieces - 3) + last
    for there in seen:
        assert (there == decoding.frames[: len(there)]).all()
