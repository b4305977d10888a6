"""Slices of tokens: the same numbers as all tokens at once, in bounded memory."""

import pytest
import torch
from torch import Tensor, nn

from runtime.layers.slices import in_slices
from runtime.linear import forced_way, swap_linears
from runtime.transformer import Transformer, TransformerConfig
from tests.live_memory import peak_of

CONFIG = TransformerConfig(64, 96, num_heads=2, num_layers=2, text_dim=32, text_len=16)
FULL = TransformerConfig(5120, 13824, num_heads=40, num_layers=2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("step", [None, 1, 3, 7, 8, 20])
def test_a_function_of_single_tokens_does_not_notice(step: int | None) -> None:
    x, y = random(2, 7, 5), random(1, 7, 5, seed=1)
    assert torch.equal(in_slices(lambda a, b: a * 2 + b, x, y, step=step), x * 2 + y)
    doubled, rows = in_slices(lambda a: (a * 2, a.sum(-1)), x, step=step)
    assert torch.equal(doubled, x * 2) and torch.equal(rows, x.sum(-1))
    places = (random(2, 7, 5, seed=2), random(2, 7, seed=3))
    written = []

    def both(a: Tensor, into: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if into is None:
            return a * 2, a.sum(-1)
        written.append(a.shape[1])
        return torch.mul(a, 2, out=into[0]), a.sum(-1)  # the first there already, the second to be copied

    doubled, rows = in_slices(both, x, step=step, into=places)
    assert sum(written) == (7 if step is not None and step < 7 else 0)
    assert torch.equal(doubled, x * 2) and torch.equal(rows, x.sum(-1))
    assert (doubled is places[0] and rows is places[1]) == (step is not None and step < 7)


def test_a_result_may_take_the_place_of_its_input() -> None:
    x = random(1, 9, 4)
    expected = x.exp()
    assert in_slices(torch.exp, x, step=2, into=x) is x
    assert torch.equal(x, expected)


def test_gradients_flow_when_there_is_one_slice() -> None:
    x = random(1, 4, 3).requires_grad_()
    in_slices(lambda a: a * a, x, step=None, into=x).sum().backward()
    assert torch.equal(x.grad, 2 * x)


@pytest.mark.parametrize("step", [1, 5, 16, 24])
def test_a_sliced_transformer_gives_the_same_velocity(step: int) -> None:
    torch.manual_seed(3)
    model = Transformer(CONFIG).eval().requires_grad_(False)
    latents, time, text = random(2, 16, 3, 4, 4), torch.tensor([937.5, 30.0]), random(2, 16, 32)
    whole = model(latents, time, text)
    model.token_slice = step
    sliced = model(latents, time, text)
    difference = float((whole - sliced).abs().max() / whole.abs().max())
    print(f"transformer in slices of {step} of 12 tokens: max diff {difference:.2e}")
    assert difference < 2e-6


def test_conditions_of_all_steps_are_those_of_each() -> None:
    torch.manual_seed(4)
    model = Transformer(CONFIG).eval().requires_grad_(False)
    latents, text = random(1, 16, 2, 4, 4), random(1, 16, 32)
    times = [1000.0, 937.5, 625.0]
    conditions = model.conditions(torch.tensor(times)[:, None], text)
    for time, condition in zip(times, conditions, strict=True):
        difference = (
            (model.velocity(latents, condition) - model(latents, torch.tensor([time]), text)).abs().max()
        )
        print(f"condition of time {time}: max diff {difference:.2e}")
        assert difference < 1e-5


@pytest.mark.parametrize("quantization", ["bf16", "fp8"])
@pytest.mark.parametrize(("height", "width", "frames"), [(480, 832, 81), (720, 1280, 81), (480, 832, 49)])
def test_the_peak_of_a_full_size_forward_is_about_five_states(
    quantization: str, height: int, width: int, frames: int
) -> None:
    """x, q, k, v and what attention makes of them; or four of those and a slice, if that is more."""
    with torch.device("meta"):
        model = Transformer(FULL).eval().to(torch.bfloat16)
        latent_frames = (frames - 1) // 4 + 1
        latents = torch.randn(1, 16, latent_frames, height // 8, width // 8)
        time, text = torch.randn(1), torch.randn(1, 512, 4096)
    if quantization == "fp8":
        linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        swap_linears(model, {name: "fp8" for name in linears if name.startswith("blocks.")})
    tokens = latent_frames * (height // 16) * (width // 16)
    state = tokens * FULL.dim * 2
    model.token_slice = 4096
    with forced_way("rowwise"):
        sliced = peak_of(lambda: model(latents, time, text))
    model.token_slice = None
    with forced_way("rowwise"):
        whole = peak_of(lambda: model(latents, time, text))
    print(
        f"{quantization} {height}x{width}x{frames}: {sliced / state:.2f} states, {whole / state:.2f} unsliced"
    )
    slice_state = 4096 * FULL.dim * 2
    assert sliced < max(5 * state, 4 * state + 10 * slice_state) + 60 * 2**20
    assert whole > 7 * state
