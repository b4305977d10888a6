"""Rotary positions: the published angles, and the two properties that they exist for."""

import math

import pytest
import torch
from torch import Tensor

from runtime.layers.rope import apply_rope, axis_widths, rope_table

GRIDS = [(3, 4, 5), (1, 2, 7), (6, 1, 2)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_head_of_128_is_shared_out_as_published() -> None:
    assert axis_widths(128) == (44, 42, 42)
    for head_dim in range(6, 200, 2):
        assert sum(axis_widths(head_dim)) == head_dim


@pytest.mark.parametrize("grid", GRIDS)
def test_angles_are_the_published_ones(grid: tuple[int, int, int]) -> None:
    cos, sin = rope_table(grid, 128, torch.empty(0))
    assert cos.shape == sin.shape == (1, math.prod(grid), 1, 64)
    assert cos.dtype == sin.dtype == torch.float32
    worst = 0.0
    for token in range(math.prod(grid)):
        frame, row, column = token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]
        angles = [frame * 10000 ** (-2 * j / 44) for j in range(22)]
        angles += [row * 10000 ** (-2 * j / 42) for j in range(21)]
        angles += [column * 10000 ** (-2 * j / 42) for j in range(21)]
        for pair, angle in enumerate(angles):
            worst = max(worst, abs(cos[0, token, 0, pair].item() - math.cos(angle)))
            worst = max(worst, abs(sin[0, token, 0, pair].item() - math.sin(angle)))
    print(f"rope, grid {grid}: max diff {worst:.2e}")
    assert worst <= 6e-8  # half a step of fp32 below 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_last_position_is_as_exact_as_the_first(axis: int) -> None:
    grid = [1, 1, 1]
    grid[axis] = 1024
    cos, sin = rope_table((grid[0], grid[1], grid[2]), 128, torch.empty(0))
    first, width = [(0, 44), (22, 42), (43, 42)][axis]
    for j in range(width // 2):
        angle = 1023 * 10000 ** (-2 * j / width)
        assert abs(cos[0, 1023, 0, first + j].item() - math.cos(angle)) <= 6e-8
        assert abs(sin[0, 1023, 0, first + j].item() - math.sin(angle)) <= 6e-8


def test_position_zero_is_the_identity() -> None:
    x = random(2, 60, 3, 128, seed=1)
    turned = apply_rope(x, rope_table((3, 4, 5), 128, x))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert (turned[:, 1:] - x[:, 1:]).abs().amax(dim=(0, 2, 3)).min() > 0.1


@pytest.mark.parametrize("head_dim", [128, 40])
@pytest.mark.parametrize("grid", GRIDS)
def test_scores_depend_on_the_difference_of_positions_alone(
    grid: tuple[int, int, int], head_dim: int
) -> None:
    q, k = random(2, 1, 1, 1, head_dim, seed=2).unbind(0)
    table = rope_table(grid, head_dim, q)
    tokens = math.prod(grid)
    q, k = (apply_rope(t.expand(1, tokens, 1, head_dim), table)[0, :, 0] for t in (q, k))  # (L, D)
    scores = q @ k.T  # the same q and the same k everywhere, so only the positions differ
    positions = torch.cartesian_prod(*(torch.arange(n) for n in grid))  # (L, 3)
    by_difference: dict[tuple[int, ...], list[float]] = {}
    for i in range(tokens):
        for j in range(tokens):
            key = tuple((positions[i] - positions[j]).tolist())
            by_difference.setdefault(key, []).append(scores[i, j].item())
    worst = max(max(group) - min(group) for group in by_difference.values())
    print(f"rope, equal differences of positions, grid {grid}: max diff {worst:.2e}")
    assert worst <= 2e-5
    for axis in range(3):  # and each axis counts, as does the sign
        step = [int(i == axis) for i in range(3)]
        if grid[axis] > 1:
            still, ahead, behind = (by_difference[tuple(sign * n for n in step)][0] for sign in (0, 1, -1))
            assert min(abs(still - ahead), abs(still - behind), abs(ahead - behind)) > 1e-2


def test_rotation_is_of_neighbouring_pairs_and_keeps_lengths() -> None:
    x = random(1, 12, 2, 128, seed=3)
    turned = apply_rope(x, rope_table((2, 2, 3), 128, x))
    lengths = [t.unflatten(-1, (-1, 2)).norm(dim=-1) for t in (turned, x)]
    assert torch.allclose(*lengths, atol=1e-6)
    cos, sin = rope_table((2, 2, 3), 128, x)
    expected = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    difference = (turned - torch.view_as_real(expected).flatten(-2)).abs().max().item()
    print(f"rope, against complex numbers: max diff {difference:.2e}")
    assert difference <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = random(2, 30, 3, 128, seed=4).to(dtype)
    table = rope_table((2, 3, 5), 128, x)
    assert table[0].dtype == torch.float32
    turned = apply_rope(x, table)
    assert turned.dtype == dtype
    assert torch.equal(turned, apply_rope(x.float(), table).to(dtype))


def test_a_table_made_in_inference_serves_training() -> None:
    grid = (2, 5, 3)
    with torch.inference_mode():
        rope_table(grid, 16, torch.empty(0))
    x = random(1, 30, 1, 16, seed=5).requires_grad_()
    weights = random(1, 30, 1, 16, seed=6)
    (apply_rope(x, rope_table(grid, 16, x)) * weights).sum().backward()
    cos, sin = rope_table(grid, 16, x)
    assert torch.allclose(x.grad, apply_rope(weights, (cos, -sin)), atol=1e-6)  # the gradient turns back


def test_a_table_is_not_mistaken_for_another() -> None:
    """Grids with as many patches, or another head width, must not get each other's table from the cache."""
    like = torch.empty(0)
    tables = [rope_table(grid, 16, like)[0] for grid in [(2, 3, 4), (4, 3, 2), (2, 4, 3), (2, 3, 4)]]
    assert torch.equal(tables[0], tables[3])
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    assert rope_table((2, 3, 4), 32, like)[0].shape[-1] == 16


@pytest.mark.parametrize(
    ("grid", "axis"),
    [((1025, 1, 1), "frame"), ((1, 1025, 1), "row"), ((1, 1, 2000), "column"), ((1, 0, 1), "row")],
)
def test_axes_beyond_the_trained_ones_are_refused(grid: tuple[int, int, int], axis: str) -> None:
    with pytest.raises(ValueError, match=f"{axis} axis has {max(grid) if max(grid) > 1 else 0}"):
        rope_table(grid, 128, torch.empty(0))


def test_odd_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="127"):
        rope_table((1, 2, 2), 127, torch.empty(0))
