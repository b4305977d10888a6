"""Noise to latents in a handful of steps: the sigma schedule and the two update rules of the distilled model.

The transformer predicts the flow velocity v = noise - x0, and a state at noise level sigma is
x = (1 - sigma) * x0 + sigma * noise, so x0 = x - sigma * v. With shift s the schedule is

    sigma = s * u / (1 + (s - 1) * u)      at u = 1, 3/4, 1/2, 1/4 for four steps, and 0 at the end
    t     = 1000 * sigma                   fed to the transformer, not rounded to an integer

(1, .9375, .83333, .625 for shift 5). The two rules differ only in the noise of the next state:

    euler   x' = x0 + sigma' * v                       the same noise again (flow-matching Euler)
    lcm     x' = (1 - sigma') * x0 + sigma' * fresh    a new draw, as such models are distilled

Everything is fp32: four additions cost nothing, and a bf16 state would round the noise.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
SAMPLERS = ("lcm", "euler")


def schedule(steps: int = 4, shift: float = 5.0) -> list[float]:
    """Noise levels of a run, `steps` + 1 of them, from 1.0 down to 0.0 (fp32 values as Python floats).

    Follows the published step list: entry k of [1000, 750, 500, 250] is level k / 1000 before the shift.
    """
    if not 1 <= steps <= TRAIN_TIMESTEPS:
        raise ValueError(f"steps is {steps}; expected 1 to {TRAIN_TIMESTEPS}")
    levels = torch.linspace(1.0, 0.0, TRAIN_TIMESTEPS + 1, dtype=torch.float32)
    entries = [round(TRAIN_TIMESTEPS * (steps - i) / steps) for i in range(steps + 1)]
    chosen = levels[[TRAIN_TIMESTEPS - entry for entry in entries]]
    return (shift * chosen / (1 + (shift - 1) * chosen)).tolist()


def timestep(sigma: float) -> float:
    """The time that the transformer is told for noise level `sigma`: 1000 * sigma in fp32."""
    return float(torch.tensor(sigma, dtype=torch.float32) * TRAIN_TIMESTEPS)


def draw_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal fp32 noise of `shape` on the generator's device.

    A CPU generator gives the same noise for a seed on every machine; a CUDA one gives LightX2V's.
    """
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device=generator.device)


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x + (sigma' - sigma) * v, which is x0 + sigma' * v."""
    return latents + (sigma_next - sigma) * velocity


def lcm_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Tensor) -> Tensor:
    """(1 - sigma') * x0 + sigma' * noise, with x0 = x - sigma * v."""
    clean = latents - sigma * velocity
    return (1 - sigma_next) * clean + sigma_next * noise


def denoise(
    velocity_of: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    sigmas: Sequence[float],
    sampler: str,
    generator: torch.Generator,
    done: int = 0,
) -> Iterator[Tensor]:
    """Yield the latents after each step that is left, the last of them clean.

    `velocity_of(latents, t)` is the model's prediction; `noise` the start, fp32 (any shape), already drawn
    from `generator`, which then supplies the fresh noise of `lcm`. With `done` steps behind it, a run goes
    on: `noise` is what the last of them yielded and `generator` in the state that it had then.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    if not 0 <= done < len(sigmas):
        raise ValueError(f"done is {done}; expected 0 to {len(sigmas) - 1}")
    latents = noise
    for sigma, sigma_next in pairwise(sigmas[done:]):
        velocity = velocity_of(latents, timestep(sigma)).to(latents)
        if sampler == "lcm" and sigma_next > 0:
            fresh = draw_noise(latents.shape, generator).to(latents.device)
            latents = lcm_step(latents, velocity, sigma, sigma_next, fresh)
            del fresh
        else:  # at sigma' = 0 both rules give x0
            latents = euler_step(latents, velocity, sigma, sigma_next)
        # A tensor that outlives its step would lie in the middle of the next one's memory.
        del velocity
        yield latents
