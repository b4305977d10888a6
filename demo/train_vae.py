"""Train the demo's VAE: the real architecture with a sixth of its base width, on drawn scenes.

Three things decide whether it learns at all: an initialisation that keeps the variance, residual branches
that start at zero, and plain squared error first. With the default initialisation the latents become the
same for all clips while a penalty on their mean and variance still looks fine; hence `between_clips`.
"""

import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from demo.optimizer import Average, Clock, Log, cosine
from demo.scenes import (
    FRAMES,
    HEIGHT,
    HELD_OUT_SCENES,
    TRAIN_SCENES,
    WIDTH,
    centre_path,
    draw,
    render,
    scene_indices,
)
from demo.score import score_video, shares
from runtime.vae import VAE, Downsample, FrameAttention, ResidualBlock, Upsample, VAEConfig

CROP, CROP_FRAMES = 64, 9  # the first part of training sees small crops of half a clip
LATENT_NOISE = 0.1  # the decoder must live with latents that are a little off


def build_vae(base_dim: int = 16) -> VAE:
    """A VAE that is ready to be trained."""
    vae = VAE(VAEConfig(base_dim=base_dim))
    initialise(vae)
    return vae


@torch.no_grad()
def initialise(vae: VAE) -> None:
    """Keep the variance of signals from end to end, and start each residual branch at zero."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.residual.get_submodule("6").get_parameter("weight"))
        elif isinstance(module, FrameAttention):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, Downsample) and module.time_conv is not None:
            _near_identity(module.time_conv.weight, taps=(0.25, 0.5, 0.25))
        elif isinstance(module, Upsample) and module.time_conv is not None:
            _near_identity(module.time_conv.weight, taps=(0.0, 0.0, 1.0))
    # The runtime normalises latents with the published model's constants: start with the inverse of that.
    mean, std = _constants(vae)
    z_dim = vae.config.z_dim
    assert vae.conv1.bias is not None and vae.conv2.bias is not None  # both are built with one
    vae.conv1.weight[:z_dim].mul_(std.view(-1, 1, 1, 1, 1))
    vae.conv1.bias[:z_dim].copy_(mean)
    vae.conv1.weight[z_dim:].zero_()
    vae.conv1.bias[z_dim:].copy_(2 * (LATENT_NOISE * std).log())
    vae.conv2.weight.copy_(torch.diag(1 / std).view_as(vae.conv2.weight))
    vae.conv2.bias.copy_(-mean / std)


def _near_identity(weight: Tensor, taps: tuple[float, ...]) -> None:
    """A convolution over time alone (out, in, 3, 1, 1) that passes each channel on through `taps`."""
    weight.normal_(std=0.02)
    channels = weight.shape[1]
    for out in range(weight.shape[0]):
        weight[out, out % channels, :, 0, 0] += torch.tensor(taps, device=weight.device)


def _constants(vae: VAE) -> tuple[Tensor, Tensor]:
    device = vae.conv1.weight.device
    mean = torch.tensor(vae.config.latents_mean, device=device)
    return mean, torch.tensor(vae.config.latents_std, device=device)


def sample_clips(batch: int, crop: bool, table: Tensor) -> tuple[Tensor, Tensor]:
    """Random training clips (B, 3, F, H, W) and their signed distances, whole or as small crops."""
    device = table.device
    indices = table[torch.randint(len(table), (batch,), device=device)]
    path = centre_path(indices, torch.rand(batch, 2, device=device))
    if not crop:
        return draw(indices, path)
    first = torch.randint(FRAMES - CROP_FRAMES + 1, (batch, 1), device=device)
    window = first + torch.arange(CROP_FRAMES, device=device)
    path = path.gather(1, window[..., None].expand(-1, -1, 2))
    # Crops lie around the object, so that most of them show part of its outline.
    origin = path[:, CROP_FRAMES // 2] - CROP / 2 + 20 * torch.randn(batch, 2, device=device)
    limit = torch.tensor([float(WIDTH - CROP), float(HEIGHT - CROP)], device=device)
    return draw(indices, path, CROP, CROP, torch.minimum(origin.clamp(min=0), limit).round())


def reconstruction_loss(vae: VAE, frames: Tensor, distance: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Loss to minimise, and the plain squared error. Edges count more only late in training."""
    latents, _ = vae.encode_distribution(frames)
    noisy = latents + LATENT_NOISE * torch.randn_like(latents)
    decoded = vae.decode(noisy, chunked=False, clamp=False)
    statistics = latents.float().mean(dim=(0, 2, 3, 4)).square().mean() + (
        (latents.float().std(dim=(0, 2, 3, 4)) - 1).square().mean()
    )
    loss, squared = pixel_loss(decoded, frames, distance, min(max(fraction - 0.4, 0.0) / 0.2, 1.0))
    return loss + 0.05 * statistics, squared


def pixel_loss(decoded: Tensor, frames: Tensor, distance: Tensor, edges: float) -> tuple[Tensor, Tensor]:
    """Squared error, with `edges` (0..1) more at outlines and some absolute error; and the plain one."""
    difference = decoded.float() - frames
    squared = difference.square()
    near_edge = (distance.abs() < 5).unsqueeze(1).float()
    weighted = squared * (1 + 3 * edges * near_edge)
    return weighted.mean() + 0.1 * edges * difference.abs().mean(), squared.mean()


def choose_layout(vae: VAE, table: Tensor, batch: int) -> torch.memory_format:
    """Whichever memory layout of the convolutions' weights trains faster here; measured once."""
    if table.device.type != "cuda":
        return torch.contiguous_format
    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        set_layout(vae, layout)
        for _ in range(2):
            torch.cuda.synchronize()
            started = time.monotonic()
            for _ in range(3):
                _gradient(vae, batch, True, table, 0.0)
            torch.cuda.synchronize()
            seconds[layout] = (time.monotonic() - started) / 3
    vae.zero_grad(set_to_none=True)
    print("seconds a step:", {str(k): round(v, 4) for k, v in seconds.items()}, flush=True)
    return min(seconds, key=lambda layout: seconds[layout])


def set_layout(vae: VAE, layout: torch.memory_format) -> None:
    """Lay the convolutions' weights out in memory as `layout` says; the numbers stay the same."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
        elif isinstance(module, nn.Conv2d):
            flat = torch.channels_last if layout == torch.channels_last_3d else torch.contiguous_format
            module.weight.data = module.weight.data.contiguous(memory_format=flat)


def _gradient(vae: VAE, batch: int, crop: bool, table: Tensor, fraction: float) -> Tensor:
    frames, distance = sample_clips(batch, crop, table)
    with torch.autocast(table.device.type, torch.bfloat16, enabled=table.device.type == "cuda"):
        loss, squared = reconstruction_loss(vae, frames, distance, fraction)
    loss.backward()
    return squared.detach()


def train_vae(
    vae: VAE,
    clock: Clock,
    device: torch.device,
    *,
    rate: float = 1.5e-3,
    crop_share: float = 0.5,
    crops: int = 48,
    clips: int = 10,
    measured: int = 96,
    saved: Path | None = None,
) -> VAE:
    """Train until the clock ends; returns the averaged weights with latents folded to mean 0 and std 1."""
    table = scene_indices(list(TRAIN_SCENES), device)
    vae.to(device).train()
    set_layout(vae, choose_layout(vae, table, crops))
    average = Average(vae, 0.995)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    log = Log(("step", "seconds", "dB", "gradient"))
    saved_at = clock.elapsed()
    while (fraction := clock.fraction()) < 1:
        crop = fraction < crop_share
        optimizer.zero_grad(set_to_none=True)
        squared = _gradient(vae, crops if crop else clips, crop, table, fraction)
        length = nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(fraction)
        optimizer.step()
        average.update(vae)
        clock.step += 1
        log.row(clock, {"dB": -10 * torch.log10(squared / 4), "gradient": length})
        if saved is not None and clock.elapsed() - saved_at > 60:
            saved_at = clock.elapsed()
            torch.save(average.module.state_dict(), saved)
    log.row(clock, {"dB": -10 * torch.log10(squared / 4), "gradient": length}, force=True)
    fold_statistics(average.module, table, measured)
    return average.module


def train_decoder(
    vae: VAE,
    clock: Clock,
    device: torch.device,
    *,
    rate: float = 1e-3,
    clips: int = 10,
    saved: Path | None = None,
) -> VAE:
    """Sharpen the decoder on whole clips while the encoder, and with it the latents, stays as it is."""
    table = scene_indices(list(TRAIN_SCENES), device)
    vae.to(device).requires_grad_(False)
    trained = [*vae.decoder.requires_grad_(True).parameters(), *vae.conv2.requires_grad_(True).parameters()]
    average = Average(vae, 0.998)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    log = Log(("step", "seconds", "dB", "gradient"))
    saved_at = clock.elapsed()
    while (fraction := clock.fraction()) < 1:
        optimizer.zero_grad(set_to_none=True)
        frames, distance = sample_clips(clips, False, table)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                latents = vae.encode(frames, chunked=False)
                # From clean latents to ones as far off as the transformer's.
                strength = 2 * LATENT_NOISE * torch.rand(clips, 1, 1, 1, 1, device=device)
                latents = latents + strength * torch.randn_like(latents)
            loss, squared = pixel_loss(vae.decode(latents, chunked=False, clamp=False), frames, distance, 1.0)
        loss.backward()
        length = nn.utils.clip_grad_norm_(trained, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(fraction, warmup=0.03)
        optimizer.step()
        average.update(vae)
        clock.step += 1
        log.row(clock, {"dB": -10 * torch.log10(squared.detach() / 4), "gradient": length})
        if saved is not None and clock.elapsed() - saved_at > 60:
            saved_at = clock.elapsed()
            torch.save(average.module.state_dict(), saved)
    return average.module


@torch.no_grad()
def fold_statistics(vae: VAE, table: Tensor, clips: int) -> None:
    """Measure the latents' mean and std per channel and move them into the two 1x1x1 convolutions.

    Afterwards the normalised latents have mean 0 and std 1, and decoding gives what it gave before.
    """
    picks = torch.linspace(0, len(table) - 1, clips, device=table.device).long()
    generator = torch.Generator(device=table.device).manual_seed(1)
    start = torch.rand(clips, 2, device=table.device, generator=generator)
    latents = torch.cat(
        [encode(vae, table[picks[i : i + 16]], start[i : i + 16]) for i in range(0, clips, 16)]
    )
    middle, width = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    mean, std = _constants(vae)
    z_dim = vae.config.z_dim
    assert vae.conv1.bias is not None and vae.conv2.bias is not None  # both are built with one
    # New normalised latents z' = (z - middle) / width, with raw = z * std + mean on both sides.
    vae.conv1.weight[:z_dim].div_(width.view(-1, 1, 1, 1, 1))
    vae.conv1.bias[:z_dim].copy_((vae.conv1.bias[:z_dim] - mean - middle * std) / width + mean)
    matrix = vae.conv2.weight[:, :, 0, 0, 0]
    vae.conv2.bias.add_(matrix @ (middle * std + mean - width * mean))
    vae.conv2.weight.mul_(width.view(1, -1, 1, 1, 1))


@torch.no_grad()
def encode(vae: VAE, indices: Tensor, start: Tensor) -> Tensor:
    """Latents (B, 16, 5, 12, 20) fp32 of the scenes `indices` (B, 4) at the starting points (B, 2)."""
    frames, _ = render(indices, start)
    device = indices.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return vae.encode(frames, chunked=False).float()


@torch.no_grad()
def between_clips(vae: VAE, table: Tensor, clips: int = 32) -> float:
    """Share of the latents' variance that differs between clips at one place; near 0 means collapse."""
    picks = torch.linspace(0, len(table) - 1, clips, device=table.device).long()
    latents = encode(vae, table[picks], torch.rand(clips, 2, device=table.device))
    return float(latents.var(dim=0).mean() / latents.var())


@torch.no_grad()
def score_reconstructions(vae: VAE, device: torch.device, repeats: int = 4) -> tuple[dict[str, float], float]:
    """Scores and dB of held-out scenes after encoding and decoding: the ceiling of the whole model."""
    scenes = list(HELD_OUT_SCENES) * repeats
    results, squared = [], 0.0
    generator = torch.Generator().manual_seed(2)
    for i in range(0, len(scenes), 12):
        some = scenes[i : i + 12]
        indices = scene_indices(some, device)
        start = torch.rand(len(some), 2, generator=generator).to(device)
        frames, _ = render(indices, start)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            decoded = vae.decode(vae.encode(frames, chunked=False), chunked=False).float()
        squared += float((decoded - frames).square().mean()) * len(some)
        video = ((decoded + 1) / 2).permute(0, 2, 3, 4, 1)
        results += [score_video(clip, scene) for clip, scene in zip(video, some, strict=True)]
    return shares(results), -10 * math.log10(squared / len(scenes) / 4)
