"""Train the demo's text encoder and transformer to make scenes in four steps, with either sampler.

At the first step the model sees nothing but noise, so "which clip?" must have one answer for it to be sharp:
the starting point of the object is a function of the noise (two sums over it, mapped to 0..1 by the normal
distribution). Noise stays exactly standard normal, each seed has its own clip, and the answer is smooth in
the noise. Where fresh noise has blurred the starting point (`lcm`), the answer is the likeliest clip, not
the average of the likely ones. From half time on, half of the updates walk the four steps on the model's
own states.
"""

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from demo.optimizer import Average, Clock, Log, Muon, cosine
from demo.scenes import Scene, centre_path, draw, phrase, scene_indices
from demo.tokenizer import build_tokenizer
from demo.train_vae import encode
from runtime.sampler import schedule
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE

TEXT_LEN = 32
VOCABULARY = 64  # rows of the embedding; the tokenizer knows fewer words
LATENT_SHAPE = (16, 5, 12, 20)
SIGMAS = schedule(4, 5.0)
PHRASES = 64  # phrasings kept for each scene
MARGIN = 2.0  # nats by which a clip must be likelier to be aimed at instead
OBJECT_WEIGHT = 3.0  # how much more a position counts where the object is


@dataclass(frozen=True)
class Sizes:
    """Sizes of the two networks; the defaults are the shipped demo."""

    text_dim: int = 128
    text_ffn: int = 256
    text_layers: int = 2
    dim: int = 256
    ffn_dim: int = 768
    heads: int = 2
    layers: int = 6


class Generator(nn.Module):
    """Text encoder and transformer together: what is trained jointly."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(
            TextEncoderConfig(
                VOCABULARY, sizes.text_dim, sizes.text_dim, sizes.text_ffn, 2, sizes.text_layers
            )
        )
        self.transformer = Transformer(
            TransformerConfig(
                *(sizes.dim, sizes.ffn_dim, sizes.heads, sizes.layers),
                text_dim=sizes.text_dim,
                text_len=TEXT_LEN,
            )
        )

    def text_states(self, ids: Tensor) -> Tensor:
        """Padded ids (B, TEXT_LEN) -> text states (B, TEXT_LEN, text_dim), zero after the end mark."""
        mask = ids != 0
        return self.text_encoder(ids, mask) * mask.unsqueeze(-1)

    def forward(self, latents: Tensor, sigma: Tensor, states: Tensor) -> Tensor:
        """Velocity of latents (B, 16, T, h, w) at noise levels sigma (B,)."""
        return self.transformer(latents, 1000.0 * sigma, states)


@torch.no_grad()
def initialise(model: Generator) -> None:
    """Branches start small; the untrained transformer hands its input through as the velocity."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embedding" not in name and "head" not in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            if name.endswith((".o.weight", "ffn.2.weight", "fc2.weight")):
                nn.init.zeros_(parameter)
            if "text_encoder" in name and name.endswith(".q.weight"):
                # The real encoder does not scale its scores; the start must.
                parameter.mul_((parameter.shape[0] // model.text_encoder.config.num_heads) ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    net = model.transformer
    nn.init.normal_(model.text_encoder.token_embedding.weight)
    for name, parameter in net.named_parameters():
        if name.endswith("modulation"):
            nn.init.zeros_(parameter)
            if name.startswith("blocks."):
                parameter[:, (2, 5)] = 1.0  # the gates
    for name in ("time_embedding.2.weight", "time_projection.1.weight"):
        nn.init.normal_(net.get_parameter(name), std=0.02)
    _pass_through(net)


def _pass_through(net: Transformer) -> None:
    """Patches enter along orthonormal directions beside a large constant, and leave along the same.

    The constant keeps the last norm's divisor nearly the same for every token, so the copy is linear.
    """
    dim, inputs = net.config.dim, net.patch_embedding.weight[0].numel()
    directions = torch.randn(dim, inputs + 1)
    directions = torch.linalg.qr(directions - directions.mean(dim=0))[0]
    constant = directions[:, -1] * 3 * inputs**0.5
    net.patch_embedding.weight.copy_(directions[:, :-1].view_as(net.patch_embedding.weight))
    assert net.patch_embedding.bias is not None  # built with one
    net.patch_embedding.bias.copy_(constant)
    gain = ((10 * inputs) / dim) ** 0.5  # norm of a token over that of a normalised one
    out = net.patch_embedding.weight.permute(3, 4, 1, 0, 2).reshape(inputs, dim)  # (ph, pw, channel) rows
    net.head.head.weight.copy_(gain * out)


def checkerboard(noise: Tensor) -> Tensor:
    """Signs (h, w) that alternate along both axes; plain areas of latents add nothing to such a sum."""
    rows, columns = (torch.arange(n, device=noise.device) for n in noise.shape[-2:])
    return 1.0 - 2.0 * ((rows[:, None] + columns) % 2)


def start_values(noise: Tensor) -> Tensor:
    """The two standard normal numbers (B, 2) in noise (B, 16, T, h, w) that say where the object starts."""
    return (noise[:, :2] * checkerboard(noise)).flatten(2).sum(dim=2) / noise[0, 0].numel() ** 0.5


def start_from_noise(noise: Tensor) -> Tensor:
    """Starting point (B, 2) in 0..1 that belongs to noise (B, 16, T, h, w): uniform when noise is normal."""
    values = start_values(noise)
    return 0.5 * (1 + torch.erf(values / math.sqrt(2)))


def noise_for_start(start: Tensor, shape: tuple[int, ...] = LATENT_SHAPE) -> Tensor:
    """Standard normal noise (B, *shape) given that `start_from_noise` of it is `start` (B, 2)."""
    noise = torch.randn(len(start), *shape, device=start.device)
    count = noise[0, 0].numel()
    wanted = math.sqrt(2) * torch.erfinv((2 * start - 1).clamp(-0.999, 0.999))
    lacking = (wanted - start_values(noise)) / count**0.5
    noise[:, :2] += lacking[:, :, None, None, None] * checkerboard(noise)
    return noise


class Pool:
    """Encoded training scenes: several starting points for each, with weights and phrasings."""

    def __init__(self, vae: VAE, device: torch.device, starts: int, scenes: tuple[Scene, ...]) -> None:
        self.device, self.starts = device, starts
        table = scene_indices(list(scenes), device)
        self.indices = table.repeat_interleave(starts, dim=0)  # (N, 4), N = scenes * starts
        self.scene = torch.arange(len(scenes), device=device).repeat_interleave(starts)
        # Evenly spread starting points (an additive recurrence), shifted at random for each scene.
        steps = torch.arange(starts, device=device)[:, None] * torch.tensor(
            [0.7548777, 0.5698403], device=device
        )
        start = (steps + torch.rand(len(scenes), 1, 2, device=device)).remainder(1)
        self.start = start.flatten(0, 1)  # (N, 2)
        count = len(self.indices)
        self.latents = torch.empty(count, *LATENT_SHAPE, dtype=torch.bfloat16, device=device)
        self.weight = torch.empty(count, *LATENT_SHAPE[1:], dtype=torch.bfloat16, device=device)
        for i in range(0, count, 64):
            self.latents[i : i + 64] = encode(vae, self.indices[i : i + 64], self.start[i : i + 64])
            self.weight[i : i + 64] = object_weight(self.indices[i : i + 64], self.start[i : i + 64])
        self.middle, self.energy = self._spread()
        tokenizer = build_tokenizer()
        choice = random.Random(0)
        texts = [phrase(scene, choice) for scene in scenes for _ in range(PHRASES)]
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        padded = torch.tensor([row + [0] * (TEXT_LEN - len(row)) for row in ids])
        self.ids = padded.view(len(scenes), PHRASES, TEXT_LEN).to(device)

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Random clips' numbers (B,) and token ids (B, TEXT_LEN) that describe them."""
        pick = torch.randint(len(self.indices), (batch,), device=self.device)
        chosen = torch.randint(PHRASES, (batch,), device=self.device)
        return pick, self.ids[self.scene[pick], chosen]

    def clips(self, pick: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, 16, T, h, w) and loss weights (B, 1, T, h, w) of the clips `pick` (B,)."""
        return self.latents[pick].float(), self.weight[pick].float().unsqueeze(1)

    def likeliest(self, state: Tensor, sigma: Tensor, pick: Tensor) -> Tensor:
        """For each noisy state (B, 16, T, h, w), the clip of its scene that fits it best, (B,).

        That is `pick` itself, unless another one is more likely by MARGIN. Up to a constant, the log
        likelihood of clean latents z is (<x, z> - |z|²(1-s)/2)·(1-s)/s². The scene's mean is taken off x and
        z first, so that bf16 keeps the difference between clips.
        """
        scene = self.scene[pick]
        clean = self.latents.view(-1, self.starts, state[0].numel())[scene]  # (B, starts, n)
        rest = state.flatten(1) - (1 - sigma[:, None]) * self.middle[scene]  # (B, n)
        match = torch.bmm(clean, rest.to(clean.dtype).unsqueeze(2)).squeeze(2).float()  # (B, starts)
        fit = match - 0.5 * (1 - sigma[:, None]) * self.energy[scene]
        best, where = fit.max(dim=1)
        own = fit.gather(1, (pick % self.starts)[:, None]).squeeze(1)
        better = (best - own) * (1 - sigma) / sigma.square() > MARGIN
        return torch.where(better, scene * self.starts + where, pick)

    def _spread(self) -> tuple[Tensor, Tensor]:
        """Mean latents of each scene (S, n), and each clip's squared distance from it (S, starts)."""
        scenes = self.latents.view(-1, self.starts, self.latents[0].numel())
        middle = torch.stack([clips.float().mean(dim=0) for clips in scenes])
        energy = [(clips.float() - m).square().sum(dim=1) for clips, m in zip(scenes, middle, strict=True)]
        return middle, torch.stack(energy)


def object_weight(indices: Tensor, start: Tensor) -> Tensor:
    """Loss weight of each latent position (B, T, h, w): more where the object, or its outline, passes."""
    path = centre_path(indices, start)
    _, distance = draw(indices, path)
    near = (distance < 4).float()
    first = nn.functional.max_pool3d(near[:, :1], (1, 8, 8))
    later = nn.functional.max_pool3d(near[:, 1:], (4, 8, 8))
    return 1 + OBJECT_WEIGHT * torch.cat([first, later], dim=1)


def sample_sigmas(batch: int, device: torch.device) -> Tensor:
    """Noise levels (B,): mostly the four of inference; the rest anywhere."""
    levels = torch.tensor(SIGMAS[:4], device=device)
    chances = torch.tensor([0.3, 0.25, 0.2, 0.12, 0.13], device=device)
    kind = torch.multinomial(chances, batch, replacement=True)
    uniform = torch.rand(batch, device=device)
    anywhere = 5 * uniform / (1 + 4 * uniform)
    return torch.where(kind < 4, levels[kind.clamp(max=3)], anywhere.clamp(0.02, 1.0))


def weighted_error(velocity: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of the velocity; the weights' mean is divided out."""
    return ((velocity - target).square() * weight).mean() / weight.mean()


def plain_loss(model: Generator, pool: Pool, batch: int) -> Tensor:
    """Velocity error at random noise levels."""
    pick, ids = pool.draw(batch)
    clean, weight = pool.clips(pick)
    sigma = sample_sigmas(batch, pool.device)
    coupled = noise_for_start(pool.start[pick])
    free = torch.randn_like(coupled)
    # Near sigma 1 nothing but the noise says where the object is; below, `lcm` brings fresh noise.
    use_free = (sigma < 0.96) & (torch.rand_like(sigma) < 0.6)
    noise = torch.where(use_free.view(-1, 1, 1, 1, 1), free, coupled)
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * clean + level * noise
    # Down to here free noise hides the starting point: aim at one likely clip, not at the mean of many.
    unsure = use_free & (sigma > 0.7)
    with torch.no_grad():
        clean, weight = pool.clips(torch.where(unsure, pool.likeliest(noisy, sigma, pick), pick))
    target = (noisy - clean) / level
    return weighted_error(model(noisy, sigma, model.text_states(ids)), target, weight)


def rollout_losses(model: Generator, pool: Pool, batch: int) -> list[Tensor]:
    """Velocity errors along four steps of the model's own making; half go by euler, half by lcm.

    By euler, each state's target is the velocity that leads to the clip which the first noise stands for; by
    lcm, to the clip that fits the state best.
    """
    pick, ids = pool.draw(batch)
    noise = noise_for_start(pool.start[pick])
    by_euler = torch.arange(batch, device=pool.device) % 2 == 0
    state = noise
    states = model.text_states(ids)
    losses = []
    for sigma, following in pairwise(SIGMAS):
        level = torch.full((batch,), sigma, device=pool.device)
        with torch.no_grad():
            best = pick if sigma == 1 else torch.where(by_euler, pick, pool.likeliest(state, level, pick))
            clean, weight = pool.clips(best)
        velocity = model(state, level, states)
        losses.append(weighted_error(velocity, (state - clean) / sigma, weight))
        velocity = velocity.detach()
        guess = state - sigma * velocity
        euler = guess + following * velocity
        lcm = (1 - following) * guess + following * torch.randn_like(guess)
        state = torch.where(by_euler.view(-1, 1, 1, 1, 1), euler, lcm)
    return losses


def split_parameters(model: Generator) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside blocks, for Muon, and everything else, for AdamW."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = ".blocks." in name and parameter.dim() == 2 and "pos_embedding" not in name
        (matrices if inner else rest).append(parameter)
    return matrices, rest


def train_generator(
    model: Generator,
    pool: Pool,
    clock: Clock,
    *,
    batch: int = 256,
    rollout_batch: int = 160,
    rate: float = 0.022,
    rollout_from: float = 0.45,
    saved: Path | None = None,
) -> Generator:
    """Train until the clock ends; returns the averaged weights."""
    device = pool.device
    average = Average(model, 0.997)
    matrices, rest = split_parameters(model)
    muon = Muon(matrices, rate)
    adam = torch.optim.AdamW(rest, lr=0.1 * rate, betas=(0.9, 0.98), weight_decay=0.0)
    log = Log(("step", "seconds", "loss", "own 1", "own 2", "own 3", "own 4"))
    own: list[Tensor] = [torch.zeros(())] * 4
    loss, saved_at = torch.zeros(()), clock.elapsed()
    while (fraction := clock.fraction()) < 1:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if fraction > rollout_from and clock.step % 2:
                own = rollout_losses(model, pool, rollout_batch)
                torch.stack(own).mean().backward()
                own = [value.detach() for value in own]
            else:
                loss = plain_loss(model, pool, batch)
                loss.backward()
                loss = loss.detach()
        nn.utils.clip_grad_norm_(rest, 1.0)
        factor = cosine(fraction)
        muon.step(factor)
        for group in adam.param_groups:
            group["lr"] = 0.1 * rate * factor
        adam.step()
        average.update(model)
        clock.step += 1
        log.row(clock, {"loss": loss, **{f"own {i}": value for i, value in enumerate(own)}})
        if saved is not None and clock.elapsed() - saved_at > 60:
            saved_at = clock.elapsed()
            torch.save(average.module.state_dict(), saved)
    log.row(clock, {"loss": loss, **{f"own {i}": value for i, value in enumerate(own)}}, force=True)
    return average.module
