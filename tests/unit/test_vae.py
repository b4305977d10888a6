"""The VAE's properties: names, both forms equal, causal in time, no state between calls, bounded memory."""

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor

from runtime.layers.causal_conv import CausalConv3d, History, run_in_chunks
from runtime.vae import VAE, ChannelNorm, VAEConfig

CONFIG = VAEConfig(base_dim=4)

PUBLISHED_SHAPES = {
    "conv1.weight": (32, 32, 1, 1, 1),
    "conv2.bias": (16,),
    "encoder.conv1.weight": (96, 3, 3, 3, 3),
    "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
    "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
    "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
    "encoder.downsamples.8.time_conv.bias": (384,),
    "encoder.downsamples.10.residual.6.weight": (384, 384, 3, 3, 3),
    "encoder.middle.1.norm.gamma": (384, 1, 1),
    "encoder.head.2.weight": (32, 384, 3, 3, 3),
    "decoder.conv1.weight": (384, 16, 3, 3, 3),
    "decoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
    "decoder.middle.1.proj.bias": (384,),
    "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
    "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
    "decoder.upsamples.4.residual.2.weight": (384, 192, 3, 3, 3),
    "decoder.upsamples.7.resample.1.weight": (192, 384, 3, 3),
    "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
    "decoder.upsamples.14.residual.3.gamma": (96, 1, 1, 1),
    "decoder.head.0.gamma": (96, 1, 1, 1),
    "decoder.head.2.weight": (3, 96, 3, 3, 3),
}


def random_vae(config: VAEConfig = CONFIG, seed: int = 3) -> VAE:
    """A VAE with every tensor random, and activations near 1 all the way through."""
    generator = torch.Generator().manual_seed(seed)
    vae = VAE(config)
    for name, tensor in vae.named_parameters():
        if name.endswith("gamma"):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            tensor.data.normal_(0, 0.1, generator=generator)
        else:
            tensor.data.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    vae.decoder.head[2].weight.data *= 0.3
    return vae


@pytest.fixture(scope="module")
def vae() -> VAE:
    return random_vae()


def random_latents(length: int, height: int = 3, width: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(1, 16, length, height, width, generator=torch.Generator().manual_seed(seed))


def random_frames(count: int, height: int = 24, width: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, count, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


# --- what the published checkpoint demands


def test_published_names_and_shapes():
    with torch.device("meta"):
        tensors = VAE(VAEConfig()).state_dict()
    assert len(tensors) == 194
    assert sum(tensor.numel() for tensor in tensors.values()) == 126_892_531
    assert {name: tuple(tensors[name].shape) for name in PUBLISHED_SHAPES} == PUBLISHED_SHAPES


@torch.no_grad()
def test_built_on_meta_and_loaded_by_assignment_it_is_whole(vae):
    with torch.device("meta"):
        loaded = VAE(CONFIG)
    loaded.load_state_dict(vae.state_dict(), strict=True, assign=True)
    latents, frames = random_latents(2), random_frames(5)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))
    assert torch.equal(loaded.encode(frames), vae.encode(frames))


@torch.no_grad()
def test_without_its_encoder_it_decodes_the_same(vae):
    with torch.device("meta"):
        loaded = VAE(CONFIG, encoder=False)
    every, ours = vae.state_dict(), loaded.state_dict()
    assert {name for name in every if name not in ours} == {
        name for name in every if name.startswith(VAE.ENCODER_PREFIXES)
    }
    loaded.load_state_dict({name: every[name] for name in ours}, strict=True, assign=True)
    assert sum(tensor.numel() for tensor in ours.values()) < 0.7 * sum(t.numel() for t in every.values())
    latents = random_latents(2)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))
    with pytest.raises(RuntimeError, match=r"encoder=False.*only decodes"):
        loaded.encode(random_frames(5))


# --- the two forms


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 5])
@torch.no_grad()
def test_chunked_equals_at_once(length, dtype, bound):
    vae = random_vae(seed=length).to(dtype)
    latents, frames = random_latents(length).to(dtype), random_frames(4 * length - 3).to(dtype)

    decoded = vae.decode(latents)
    difference = largest(decoded - vae.decode(latents, chunked=False))
    print(f"decode, {length} latent frames, {dtype}: max diff {difference:.2e}")
    assert difference <= bound
    assert decoded.shape == (1, 3, 4 * length - 3, 24, 16) and decoded.dtype == dtype
    assert 0.05 < decoded.std() < 1

    encoded = vae.encode(frames)
    difference = largest(encoded - vae.encode(frames, chunked=False))
    print(f"encode, {4 * length - 3} frames, {dtype}: max diff {difference:.2e}")
    assert difference <= bound
    assert encoded.shape == (1, 16, length, 3, 2) and encoded.dtype == dtype


@torch.no_grad()
def test_chunks_may_have_any_length(vae):
    z, frames = random_latents(6), random_frames(17)
    decoded = torch.cat([*run_in_chunks(vae.decoder, z.split([2, 1, 3], dim=2))], dim=2)
    assert largest(decoded - vae.decoder(z)) <= 1e-5
    encoded = torch.cat([*run_in_chunks(vae.encoder, frames.split([5, 8, 4], dim=2))], dim=2)
    assert largest(encoded - vae.encoder(frames)) <= 1e-5


@torch.no_grad()
def test_decode_chunks_yields_one_frame_then_four_each(vae):
    latents = random_latents(3)
    chunks = [*vae.decode_chunks(latents)]
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(latents))


# --- time


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "at once"])
@pytest.mark.parametrize("t", [0, 1, 3])
@torch.no_grad()
def test_a_latent_frame_changes_no_earlier_frame(vae, t, chunked):
    latents = random_latents(4)
    changed = latents.clone()
    changed[:, :, t] = random_latents(1, seed=1)[:, :, 0]
    difference = (vae.decode(changed, chunked=chunked) - vae.decode(latents, chunked=chunked)).abs()
    per_frame = difference.amax(dim=(0, 1, 3, 4))  # (F,)
    first = max(4 * t - 3, 0)
    assert per_frame[:first].sum() == 0
    assert per_frame[first] > 1e-3


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "at once"])
@torch.no_grad()
def test_a_frame_changes_no_earlier_latent_frame(vae, chunked):
    frames = random_frames(9)
    changed = frames.clone()
    changed[:, :, 5] = random_frames(1, seed=1)[:, :, 0]
    difference = (vae.encode(changed, chunked=chunked) - vae.encode(frames, chunked=chunked)).abs()
    per_frame = difference.amax(dim=(0, 1, 3, 4))  # (T,)
    assert per_frame[:2].sum() == 0
    assert per_frame[2] > 1e-3


# --- no state, bounded memory


@torch.no_grad()
def test_passes_may_interleave(vae):
    first, second = random_latents(3, seed=1), random_latents(3, seed=2)
    pairs = [*zip(vae.decode_chunks(first), vae.decode_chunks(second), strict=True)]
    assert torch.equal(torch.cat([a for a, _ in pairs], dim=2), vae.decode(first))
    assert torch.equal(torch.cat([b for _, b in pairs], dim=2), vae.decode(second))


@torch.no_grad()
def test_a_pass_that_fails_or_is_dropped_leaves_nothing_behind(vae):
    latents = random_latents(3)
    expected = vae.decode(latents)
    next(vae.decode_chunks(random_latents(3, seed=1)))

    def fail(*_: object) -> None:
        raise RuntimeError("interrupted")

    chunks = vae.decode_chunks(random_latents(3, seed=2))
    next(chunks)
    hook = vae.decoder.upsamples[8].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        next(chunks)
    hook.remove()
    assert torch.equal(vae.decode(latents), expected)


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) is torch.Tensor
    }
    return sum(storages.values())


@torch.no_grad()
def test_decode_chunks_keeps_no_earlier_chunk(vae):
    held = []
    alive: list[weakref.ref[Tensor]] = []
    before = live_bytes()
    for frames in vae.decode_chunks(random_latents(6)):
        alive.append(weakref.ref(frames))
        del frames
        held.append(live_bytes() - before)
        assert alive[-1]() is None
    # The time convolutions have a history from the second chunk on; after that nothing grows.
    assert held[1:] == [held[-1]] * 5
    histories = 2 * sum(history_sizes(vae)) * 4
    print(f"held between chunks: {held[-1]} bytes, of these histories {histories}")
    assert held[-1] == histories + random_latents(6).nbytes  # what conv2 makes of the latents


def history_sizes(vae: VAE) -> list[int]:
    """Elements in one input frame of each causal convolution of the decoder, for latents of 3x2."""
    sizes: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0][:, :, 0].numel()))
        for module in vae.decoder.modules()
        if isinstance(module, CausalConv3d)
    ]
    vae.decode(random_latents(2), chunked=False)
    for hook in hooks:
        hook.remove()
    return sizes


def test_history_keeps_the_frames_and_not_the_chunk_around_them():
    history, layer = History(), CausalConv3d(2, 2)
    x = torch.randn(1, 2, 9, 3, 4)
    history.remember(layer, x, 2)
    kept = history.recall(layer)
    assert kept is not None and torch.equal(kept, x[:, :, -2:])
    assert kept.untyped_storage().nbytes() == 2 * x[:, :, 0].nbytes


# --- training


def test_gradient_reaches_every_parameter():
    vae = random_vae()
    mu, logvar = vae.encode_distribution(random_frames(9))
    frames = vae.decode(mu, chunked=False, clamp=False)
    (frames.square().mean() + mu.square().mean() + logvar.square().mean()).backward()
    without = [n for n, p in vae.named_parameters() if p.grad is None or not 0 < p.grad.norm() < math.inf]
    assert without == []


def test_gradient_is_the_same_in_both_forms():
    vae = random_vae().double()
    latents = random_latents(3).double().requires_grad_()
    weight = torch.randn(1, 3, 9, 24, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((vae.decode(latents, chunked=chunked) * weight).sum(), latents)[0]
        for chunked in (True, False)
    ]
    assert gradients[0].norm() > 0.1
    assert largest(gradients[0] - gradients[1]) <= 1e-9 * largest(gradients[0])


def test_training_under_bf16_autocast():
    vae, frames = random_vae(), random_frames(9)
    with torch.no_grad():
        exact = vae.decode(vae.encode(frames, chunked=False), chunked=False, clamp=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mu, _ = vae.encode_distribution(frames)
        decoded = vae.decode(mu, chunked=False, clamp=False)
        loss = (decoded - frames).square().mean()
    loss.backward()
    assert mu.dtype == decoded.dtype == torch.float32
    relative = ((decoded - exact).norm() / exact.norm()).item()
    print(f"bf16 autocast against fp32: relative {relative:.2e}")
    assert 1e-5 < relative < 0.1
    decoder = [p.grad for p in vae.decoder.parameters()]
    assert all(grad is not None and grad.isfinite().all() and grad.norm() > 0 for grad in decoder)


# --- numbers at the edges


@torch.no_grad()
def test_frames_are_clamped_unless_told_otherwise():
    vae = random_vae()
    vae.decoder.head[2].weight.mul_(10)
    latents = random_latents(2)
    for chunked in (True, False):
        free = vae.decode(latents, chunked=chunked, clamp=False)
        assert free.min() < -1.5 and free.max() > 1.5
        assert torch.equal(vae.decode(latents, chunked=chunked), free.clamp(-1, 1))


@torch.no_grad()
def test_normalisation_follows_the_config():
    plain = VAEConfig(base_dim=4, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
    ours, bare = random_vae(CONFIG), random_vae(plain)
    mean, std = torch.tensor([CONFIG.latents_mean, CONFIG.latents_std]).view(2, 1, 16, 1, 1, 1)
    frames, latents = random_frames(5), random_latents(2)
    mu, logvar = bare.encode_distribution(frames)
    ours_mu, ours_logvar = ours.encode_distribution(frames)
    torch.testing.assert_close(ours_mu, (mu - mean) / std)
    torch.testing.assert_close(ours_logvar.exp(), logvar.exp() / std**2)
    torch.testing.assert_close(ours.decode(latents), bare.decode(latents * std + mean))


@torch.no_grad()
def test_bf16_weights_round_the_latents_once():
    vae, latents = random_vae().bfloat16(), random_latents(2)
    seen: list[Tensor] = []
    hook = vae.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoded = vae.decode(latents)
    hook.remove()
    mean, std = torch.tensor([CONFIG.latents_mean, CONFIG.latents_std]).view(2, 1, 16, 1, 1, 1)
    assert torch.equal(seen[0], (latents * std + mean).bfloat16())
    assert decoded.dtype == vae.encode(random_frames(5)).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.bfloat16, 2**-8)], ids=str)
@torch.no_grad()
def test_channel_norm_is_its_formula(dtype, bound):
    generator = torch.Generator().manual_seed(2)
    norm = ChannelNorm(6).to(dtype)
    norm.gamma.uniform_(-2, 2, generator=generator)
    x = torch.randn(2, 6, 3, 4, 5, generator=generator, dtype=torch.float64).mul(100).to(dtype)
    x[0, :, 0, 0, 0] = 0
    wide = x.double()
    expected = (
        wide / wide.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12) * 6**0.5 * norm.gamma.double()
    )
    difference = largest(norm(x).double() - expected) / largest(expected)
    print(f"norm in {dtype}: relative {difference:.2e}")
    assert norm(x).dtype == dtype
    assert difference <= bound


# --- what is refused


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 4, 5, 24, 16), r"\(1, 4, 5, 24, 16\)"),
        ((3, 5, 24, 16), r"\(3, 5, 24, 16\)"),
        ((1, 3, 0, 24, 16), r"\(1, 3, 0, 24, 16\)"),
        ((1, 3, 8, 24, 16), "8 frames.*multiple of 4 plus 1"),
        ((1, 3, 5, 20, 16), "20x16.*multiples of 8"),
        ((1, 3, 5, 24, 17), "24x17.*multiples of 8"),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "at once"])
def test_encode_refuses_with_the_values(vae, shape, words, chunked):
    with pytest.raises(ValueError, match=words):
        vae.encode(torch.rand(shape), chunked=chunked)


@pytest.mark.parametrize("shape", [(1, 15, 2, 3, 2), (16, 2, 3, 2), (1, 16, 0, 3, 2)], ids=str)
def test_decode_refuses_at_the_call_with_the_values(vae, shape):
    for decode in (vae.decode, vae.decode_chunks, lambda latents: vae.decode(latents, chunked=False)):
        with pytest.raises(ValueError, match=str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")):
            decode(torch.rand(shape))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"temporal_downsample": (True, True)}, "temporal_downsample has 2"),
        ({"latents_mean": (0.0,) * 4}, "latents_mean has 4.*16"),
        ({"latents_std": (1.0,) * 17}, "latents_std has 17.*16"),
        ({"base_dim": 7}, "base_dim is 7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_refuses_sizes_that_contradict_each_other(sizes, words):
    with pytest.raises(ValueError, match=words):
        VAEConfig(**sizes)
