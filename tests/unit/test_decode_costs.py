"""The costs of a decode against the decode: its steps, live bytes at full size, counted multiplications."""

import math
import time
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from runtime.kernels.interleave import interleave_torch
from runtime.layers import video_blocks
from runtime.layers.tiles import Rung, Span
from runtime.memory import decode_costs
from runtime.memory.costs import reserved
from runtime.memory.decode_costs import WHOLE, decode_bytes, decode_time_factor, decode_workspace, rungs
from runtime.vae import VAE, VAEConfig
from runtime.vae_tiles import decode_pieces
from tests.live_memory import peak_of

SIZES = [(480, 832), (720, 1280)]
LADDERS = {size: rungs(*size) for size in SIZES}


def decoder(base_dim: int = 96, dtype: torch.dtype = torch.bfloat16) -> VAE:
    """A VAE without encoder on the meta device."""
    with torch.device("meta"):
        return VAE(VAEConfig(base_dim=base_dim), encoder=False).to(dtype).requires_grad_(False)


def measured(vae: VAE, rung: Rung, height: int, width: int, frames: int) -> int:
    """The most bytes alive in a real decode, by a taker that holds one piece at a time."""
    latents = torch.empty(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device="meta")

    def run() -> None:
        for piece in decode_pieces(vae, latents, rung):
            assert piece.frames.dtype == torch.float32

    return peak_of(run, *vae.parameters(), latents)


def compare(what: str, live: int, predicted: int) -> None:
    print(
        f"{what}: live {live / 1e9:.3f} GB, predicted {predicted / 1e9:.3f} GB, {predicted / live - 1:+.2%}"
    )
    assert live <= predicted <= 1.03 * live


@pytest.fixture
def largest_tile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode only the tile that has margins on the most sides and the largest area: the others need less."""
    all_tiles = Rung.tiles

    def one(rung: Rung, height: int, width: int) -> list[tuple[Span, Span]]:
        grid = rung.grid(height, width)

        def weight(tile: tuple[Span, Span]) -> tuple[int, int]:
            inner = sum(part.start > 0 for part in tile) + sum(
                part.stop < n for part, n in zip(tile, grid, strict=True)
            )
            return inner, len(tile[0]) * len(tile[1])

        return [max(all_tiles(rung, height, width), key=weight)]

    monkeypatch.setattr(Rung, "tiles", one)


# --- the list mirrors the decoder


@pytest.mark.parametrize("base_dim", [8, 96])
def test_steps_are_the_decoder_s(base_dim):
    vae = decoder(base_dim)
    steps = decode_costs.decoder_steps(base_dim)
    theirs = vae.decoder.frame_steps()[1]
    assert [(step.reach, step.scale) for step in steps] == [(step.reach, step.scale) for step in theirs]
    assert sum(step.weights for step in steps) == sum(parameter.numel() for parameter in vae.parameters())


@pytest.mark.parametrize("split", [0, 1])
def test_parts_are_the_decoder_s(split):
    before, after = decode_costs._parts(decode_costs.decoder_steps(8), Rung("", split, 1, 2))
    theirs = decoder(8).decoder.frame_steps(split)
    assert (len(before), len(after)) == tuple(map(len, theirs))


# --- bytes


@pytest.mark.parametrize(
    ("size", "rung"),
    [(size, rung) for size in SIZES for rung in LADDERS[size]],
    ids=lambda value: value.name if isinstance(value, Rung) else f"{value[0]}x{value[1]}",
)
def test_bytes_at_full_size(size, rung, largest_tile_only):
    live = measured(decoder(), rung, *size, frames=5)
    compare(f"{size} {rung.name}", live, decode_bytes(rung, *size, frames=5))


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, with kernels that make nothing but their results."""
    monkeypatch.setattr(video_blocks, "one_pass", lambda x: True)
    monkeypatch.setattr(video_blocks, "norm_silu", lambda x, gamma, out, bias: out)
    monkeypatch.setattr(video_blocks, "residual_add", lambda y, x, bias: y)
    monkeypatch.setattr(video_blocks, "interleave", lambda y, bias: interleave_torch(y))


@pytest.mark.parametrize(("size", "place"), [(size, place) for size in SIZES for place in (0, 1, 3, -1)])
def test_bytes_with_the_kernels_of_a_card(size, place, largest_tile_only, as_on_a_card):
    """No band of the norm is alive there: the same formula, a little above."""
    rung = LADDERS[size][place]
    live = measured(decoder(), rung, *size, frames=5)
    compare(f"{size} {rung.name}, on a card", live, decode_bytes(rung, *size, frames=5))


@pytest.mark.parametrize("name", ["1x2-early", "1x2-late"])
def test_the_features_of_a_long_video(name, largest_tile_only):
    """What grows with the length, in a picture so small that nothing else hides it."""
    rung = next(rung for rung in LADDERS[SIZES[0]] if rung.name == name)
    live, predicted = measured(decoder(), rung, 64, 96, 9), decode_bytes(rung, 64, 96, 9)
    compare(f"{name}, 9 frames", live, predicted)


@pytest.mark.parametrize("rung", [WHOLE, Rung("", 0, 1, 3), Rung("", 1, 2, 1)], ids=str)
def test_bytes_of_other_models_and_of_all_tiles(rung):
    vae = decoder(32, torch.float32)
    compare(f"fp32, {rung}", measured(vae, rung, 200, 328, 5), decode_bytes(rung, 200, 328, 5, 32, 4))


def test_one_frame_needs_no_more_than_is_said():
    for rung in (WHOLE, Rung("", 0, 1, 2)):
        live, predicted = measured(decoder(), rung, 480, 832, 1), decode_bytes(rung, 480, 832, 1)
        print(f"one frame, {rung}: live {live / 1e9:.3f} GB, predicted {predicted / 1e9:.3f} GB")
        assert live <= predicted <= 1.1 * live


# --- work


@pytest.mark.parametrize("rung", [Rung("", 0, 2, 1)], ids=str)
def test_time_factor_is_the_ratio_of_multiplications(rung):
    """Counted for one more latent frame, without the attention, which is not cut and not in the factor."""
    vae = decoder()
    vae.decoder.middle[1].frame_steps = list

    def work(rung: Rung, length: int) -> int:
        latents = torch.empty(1, 16, length, 30, 52, device="meta")
        with FlopCounterMode(display=False) as counter:
            for _ in decode_pieces(vae, latents, rung):
                pass
        return counter.get_total_flops()

    counted = (work(rung, 2) - work(rung, 1)) / (work(WHOLE, 2) - work(WHOLE, 1))
    factor = decode_time_factor(rung, 240, 416, speed=1e-3)  # a card that never waits for a launch
    print(f"{rung}: counted {counted:.4f}, predicted {factor:.4f}")
    assert factor == pytest.approx(counted, rel=5e-3)


# --- the ladder


@pytest.mark.parametrize("size", [*SIZES, (832, 480), (256, 256), (128, 128), (16, 16)], ids=str)
def test_each_rung_is_leaner_and_slower(size):
    ladder = rungs(*size)
    needs = [decode_bytes(rung, *size, 81) for rung in ladder]
    factors = [decode_time_factor(rung, *size) for rung in ladder]
    for rung, need, factor in zip(ladder, needs, factors, strict=True):
        print(f"{size} {rung.name:10} {need / 1e9:6.3f} GB  x {factor:.3f}")
    assert ladder[0] == WHOLE and factors[0] == 1
    assert all(after <= 0.9 * before for before, after in pairwise(needs))
    assert factors == sorted(factors)
    assert len({rung.name for rung in ladder}) == len(ladder)


def test_ladders_of_the_published_sizes():
    names = {size: [rung.name for rung in ladder] for size, ladder in LADDERS.items()}
    assert names[480, 832] == [
        *("whole", "1x2-late", "1x2-early", "1x3-early", "2x2-early"),
        *("2x3-early", "2x4-early", "3x4-early", "4x4-early", "4x6-early"),
    ]
    assert names[720, 1280] == [
        *("whole", "1x2-late", "1x2-early", "1x3-early", "2x2-early"),
        *("2x3-early", "2x4-early", "2x5-early", "3x5-early", "4x5-early"),
    ]


@pytest.mark.parametrize(
    ("size", "gigabytes", "speed", "factor"),
    [((480, 832), 2.5, 1, 1.15), ((480, 832), 1.3, 0.1, 1.15), ((720, 1280), 3.0, 1, 1.15)],
    ids=str,
)
def test_lean_rungs_cost_little_time(size, gigabytes, speed, factor):
    """With all that torch reserves beside the tensors."""
    needs = {rung: decode_bytes(rung, *size, 81) for rung in LADDERS[size]}
    totals = {rung: need + decode_workspace(need) for rung, need in needs.items()}
    fitting = [rung for rung, total in totals.items() if total + reserved(total) <= gigabytes * 1e9]
    assert decode_time_factor(fitting[0], *size, speed) <= factor


# Time over that of the whole picture on an H200, 480x832x81 and 720x1280x41 (tests/gpu/measure_decode.py).
MEASURED = {
    (480, 832): [1, 1.094, 1.138, 1.213, 1.506, 2.132, 3.056, 3.170, 6.016, 9.476],
    (720, 1280): [1, 1.074, 1.081, 1.120, 1.170, 1.277, 1.502, 1.920, 2.946, 3.476],
}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_time_factors_are_near_the_measured_ones(size):
    errors = []
    for rung, ratio in zip(LADDERS[size], MEASURED[size], strict=True):
        errors.append(math.log(decode_time_factor(rung, *size) / ratio))
        print(f"{size} {rung.name}: measured {ratio}, predicted {ratio * math.exp(errors[-1]):.3f}")
    root_mean_square = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert root_mean_square <= 0.13 and max(map(abs, errors)) <= 0.33


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_slower_card_waits_less_for_launches(size):
    for rung in LADDERS[size][1:]:
        factors = [decode_time_factor(rung, *size, speed) for speed in (0.02, 0.1, 0.5, 1)]
        assert factors == sorted(factors) and factors[0] < factors[-1]


def test_a_ladder_is_laid_out_in_no_time():
    """Commands that answer at once ask for one."""
    seconds = []
    for height in (464, 496, 512, 528):  # sizes that no other test has asked for
        began = time.perf_counter()
        assert len(rungs(height, 848)) > 5
        seconds.append(time.perf_counter() - began)
    print(f"{min(seconds) * 1e3:.1f} ms")
    assert min(seconds) <= 0.03
