"""The VAE against diffusers' AutoencoderKLWan, with random weights in every tensor."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from runtime.checkpoint.names import to_canonical
from runtime.layers.tiles import WHOLE, Rung
from runtime.vae import VAE, VAEConfig
from runtime.vae_tiles import decode_pieces

CONFIG = VAEConfig(base_dim=8)


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every tensor random, gammas and biases too, and activations near 1 all the way through."""
    for name, tensor in model.named_parameters():
        if name.endswith("gamma"):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            tensor.data.normal_(0, 0.1, generator=generator)
        else:
            tensor.data.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    # Pixels inside [-1, 1]: a clamped pixel would agree whatever came before.
    model.decoder.conv_out.weight.data *= 0.3


@pytest.fixture(scope="module")
def pair() -> tuple[VAE, AutoencoderKLWan]:
    theirs = AutoencoderKLWan(base_dim=CONFIG.base_dim).eval()
    randomise(theirs, torch.Generator().manual_seed(7))
    ours = VAE(CONFIG)
    weights = theirs.state_dict()
    names = to_canonical("vae", weights)
    ours.load_state_dict({names[name]: tensor for name, tensor in weights.items()}, strict=True)
    return ours, theirs


def statistics(model: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor([model.config.latents_mean, model.config.latents_std]).view(2, 1, -1, 1, 1, 1)
    return mean, std


def report(what: str, ours: Tensor, theirs: Tensor) -> float:
    difference = (ours - theirs).abs().max().item()
    relative = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"{what} {tuple(ours.shape)}: max diff {difference:.2e}, relative {relative:.2e}")
    return difference


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "at once"])
@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (2, 2, 4, 3), (1, 3, 5, 2), (1, 5, 3, 4)], ids=str)
@torch.no_grad()
def test_decode_equals_diffusers(pair, shape, chunked):
    ours, theirs = pair
    batch, length, height, width = shape
    latents = torch.randn(batch, 16, length, height, width, generator=torch.Generator().manual_seed(length))
    mean, std = statistics(theirs)
    expected = theirs.decode(latents * std + mean).sample
    assert 0.1 < expected.std() < 1 and (expected.abs() == 1).float().mean() < 0.05

    frames = ours.decode(latents, chunked=chunked)

    assert frames.shape == expected.shape == (batch, 3, 4 * length - 3, 8 * height, 8 * width)
    assert report("decode", frames, expected) <= 1e-4


@pytest.mark.parametrize(
    "rung", [WHOLE, Rung("2x3", 0, 2, 3), Rung("1x2", 1, 1, 2)], ids=lambda rung: rung.name
)
@torch.no_grad()
def test_decode_by_frames_and_tiles_equals_diffusers(pair, rung):
    ours, theirs = pair
    latents = torch.randn(1, 16, 3, 5, 7, generator=torch.Generator().manual_seed(11))
    mean, std = statistics(theirs)
    expected = theirs.decode(latents * std + mean).sample

    for piece in decode_pieces(ours, latents, rung):
        count, height, width = piece.frames.shape[2:]
        theirs_here = expected[:, :, piece.first :, piece.top :, piece.left :][..., :count, :height, :width]
        assert report(f"decode, {piece[1:]}", piece.frames, theirs_here) <= 1e-4


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "at once"])
@pytest.mark.parametrize("shape", [(1, 1, 24, 40), (2, 5, 32, 24), (1, 9, 40, 16), (1, 17, 24, 32)], ids=str)
@torch.no_grad()
def test_encode_equals_diffusers(pair, shape, chunked):
    ours, theirs = pair
    batch, count, height, width = shape
    frames = (
        torch.rand(batch, 3, count, height, width, generator=torch.Generator().manual_seed(count)) * 2 - 1
    )
    mean, std = statistics(theirs)
    expected = theirs.encode(frames).latent_dist
    assert expected.mean.std() > 0.1

    mu, logvar = ours.encode_distribution(frames, chunked=chunked)

    assert mu.shape == (batch, 16, (count + 3) // 4, height // 8, width // 8)
    assert report("encode, mean", mu, (expected.mean - mean) / std) <= 1e-4
    assert report("encode, log of the variance", logvar, expected.logvar - 2 * std.log()) <= 1e-4
