"""The schedule's published numbers, and the algebra of the two update rules."""

from itertools import pairwise

import pytest
import torch

from runtime.sampler import SAMPLERS, denoise, draw_noise, euler_step, lcm_step, schedule, timestep

PUBLISHED = {  # shift: sigma before each of the four steps
    5.0: [1.0, 0.9375, 0.8333333134651184, 0.625],
    1.0: [1.0, 0.75, 0.5, 0.25],
    3.0: [1.0, 0.9, 0.75, 0.5],
    8.0: [1.0, 0.96, 0.888889, 0.727273],
}


@pytest.mark.parametrize("shift", PUBLISHED)
def test_schedule_is_the_published_table(shift: float) -> None:
    sigmas = schedule(4, shift)
    worst = max(abs(a - b) for a, b in zip(sigmas, PUBLISHED[shift], strict=False))
    print(f"shift {shift}: max diff {worst:.2e}")
    assert len(sigmas) == 5 and sigmas[-1] == 0.0
    assert worst <= (1e-7 if shift != 8.0 else 5e-7)  # the table of shift 8 is printed to six digits


def test_timesteps_are_not_rounded() -> None:
    times = [timestep(s) for s in schedule(4, 5.0)[:4]]
    assert times == pytest.approx([1000.0, 937.5, 833.3333129882812, 625.0], abs=1e-7)


def test_euler_deltas_are_the_published_ones() -> None:
    sigmas = schedule(4, 5.0)
    deltas = [b - a for a, b in pairwise(sigmas)]
    assert deltas == pytest.approx([-0.0625, -0.1041666866, -0.2083333135, -0.625], abs=1e-7)


def test_more_steps_are_a_finer_walk() -> None:
    for steps in (1, 2, 3, 5, 8, 50, 1000):
        sigmas = schedule(steps, 5.0)
        assert len(sigmas) == steps + 1
        assert all(a > b for a, b in pairwise(sigmas))
    with pytest.raises(ValueError, match="0"):
        schedule(0)


def test_constant_velocity_is_taken_off_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    start, velocity = draw_noise((16, 3, 4, 6), generator), draw_noise((16, 3, 4, 6), generator)
    *_, end = denoise(lambda x, t: velocity, start, schedule(), "euler", generator)
    worst = float((end - (start - velocity)).abs().max())
    print(f"max diff {worst:.2e}")
    assert worst <= 1e-6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_model_returns_the_clean_latents(sampler: str) -> None:
    """With the true velocity of each state, (x - x0) / sigma, both rules end on x0."""
    generator = torch.Generator().manual_seed(5)
    clean = draw_noise((16, 2, 4, 4), generator)
    sigmas = schedule()
    states = []

    def velocity_of(x: torch.Tensor, t: float) -> torch.Tensor:
        states.append(x)
        return (x - clean) / (t / 1000)

    *_, end = denoise(velocity_of, draw_noise(clean.shape, generator), sigmas, sampler, generator)
    assert torch.allclose(end, clean, atol=2e-6)
    assert len(states) == 4


def test_rules_share_the_first_clean_estimate_and_differ_in_noise() -> None:
    generator = torch.Generator().manual_seed(7)
    x, v, fresh = (draw_noise((16, 1, 2, 2), generator) for _ in range(3))
    s, s_next = 0.9375, 0.8333333134651184
    clean, noise = x - s * v, x + (1 - s) * v
    assert torch.allclose(euler_step(x, v, s, s_next), (1 - s_next) * clean + s_next * noise, atol=1e-6)
    assert torch.allclose(lcm_step(x, v, s, s_next, fresh), (1 - s_next) * clean + s_next * fresh, atol=1e-6)


def test_a_seed_is_the_same_noise_twice() -> None:
    first, again = (draw_noise((4, 4), torch.Generator().manual_seed(11)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw_noise((4, 4), torch.Generator().manual_seed(12)))


def test_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="heun"):
        next(denoise(lambda x, t: x, torch.ones(1), schedule(), "heun", torch.Generator()))
