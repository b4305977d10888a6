"""The VAE decode on the card: its kernels against their twins, its frames against the slow twin, its memory.

pytest -m gpu tests/gpu/test_decode_gpu.py -s
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from runtime.frames import Decoding
from runtime.kernels import launch
from runtime.kernels.interleave import interleave_torch, interleave_triton
from runtime.kernels.norm_silu import norm_silu_torch, norm_silu_triton
from runtime.kernels.residual_add import residual_add_torch, residual_add_triton
from runtime.layers.tiles import WHOLE, Rung
from runtime.memory.costs import reserved
from runtime.memory.decode_costs import decode_bytes, decode_workspace
from runtime.vae_tiles import decode_pieces
from runtime.video import frames_to_uint8
from tests.gpu.measure_decode import fresh, into_bytes, random_latents, random_vae
from tests.kernel_cases import roundings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]

RUNGS = [WHOLE, Rung("1x2-late", 1, 1, 2), Rung("2x3-early", 0, 2, 3)]
SHAPES = [(1, 96, 480, 832), (2, 192, 61, 83), (1, 384, 60, 104), (1, 40, 7, 1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _kernels_work() -> None:
    trouble = launch.trouble(torch.device("cuda", 0))
    assert trouble is None, trouble


def crop(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers (B, C, H, W), channels last: a rectangle cut out of a larger picture."""
    g = torch.Generator("cuda").manual_seed(seed)
    batch, channels, height, width = shape
    whole = torch.randn(batch, height + 3, width + 5, channels, generator=g, device="cuda").mul(3).to(dtype)
    return whole[:, 1 : height + 1, 2 : width + 2].movedim(-1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_their_twins(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        channels = shape[1]
        x, y = crop(shape, dtype, 1), crop(shape, dtype, 2).contiguous(memory_format=torch.channels_last)
        bias, gamma = (torch.randn(channels, device="cuda") for _ in range(2))
        wider = torch.full((shape[0], *shape[2:], 3 * channels), float("nan"), dtype=dtype, device="cuda")
        out = wider.movedim(-1, 1)[:, channels : 2 * channels]
        norm_silu_triton(x, gamma, out=out, bias=bias)
        expected = norm_silu_torch(x, gamma, bias=bias)
        worst = roundings(out.movedim(1, -1), expected.movedim(1, -1))
        print(f"norm_silu of a crop {shape} {dtype}: {worst:.2f} roundings")
        assert worst <= (1.0 if dtype != torch.float32 else 20.0)
        assert int(wider.isnan().sum()) == 2 * out.numel()
        for added in [y.neg()] if shape[3] == 1 else [y.neg(), x]:
            assert torch.equal(
                residual_add_triton(y.clone(), added, bias), residual_add_torch(y.clone(), added, bias)
            )
        if channels % 4 == 0 and shape[3] > 1:
            corners, some = y, bias[: channels // 4]
            assert torch.equal(interleave_triton(corners, some), interleave_torch(corners, some))


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_frames_are_those_of_the_slow_twin(rung: Rung) -> None:
    latents = random_latents(240, 416, 9)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact_vae, vae = random_vae(torch.float32), random_vae(torch.bfloat16)
    with torch.inference_mode():
        exact = exact_vae.decode(latents)
        slow = (vae.decode(latents) - exact).norm() / exact.norm()
        for name, model, bound in (("fp32", exact_vae, 1e-5), ("bf16", vae, 1.1 * float(slow))):
            found = torch.full_like(exact, torch.nan)
            for piece in decode_pieces(model, latents, rung):
                count, height, width = piece.frames.shape[2:]
                found[:, :, piece.first :, piece.top :, piece.left :][..., :count, :height, :width] = (
                    piece.frames
                )
            relative = float((found - exact).norm() / exact.norm())
            print(f"{rung.name}, {name}: relative {relative:.2e}, slow twin in bf16 {float(slow):.2e}")
            assert relative <= bound


def test_bytes_are_fetched_while_the_next_piece_runs_and_are_right() -> None:
    vae, latents = random_vae(torch.bfloat16), random_latents(240, 416, 17)
    for rung in RUNGS:
        decoding = Decoding(vae, latents, rung)
        assert [*decoding] == [*range(1, decoding.pieces + 1)]
        for piece in decode_pieces(vae, latents, rung):
            count, height, width = piece.frames.shape[2:]
            theirs = decoding.frames[piece.first :, piece.top :, piece.left :][:count, :height, :width]
            assert (theirs == frames_to_uint8(piece.frames[0])).all()


@pytest.mark.parametrize("size", [(480, 832), (720, 1280)], ids=str)
@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_reserved_memory_is_as_planned(rung: Rung, size: tuple[int, int]) -> None:
    frames = 13
    vae, latents = random_vae(torch.bfloat16), random_latents(*size, frames)
    fresh()
    into_bytes(vae, latents, rung)
    live = decode_bytes(rung, *size, frames)
    total = live + decode_workspace(live)
    planned, taken = total + reserved(total), torch.cuda.max_memory_reserved()
    print(f"{size} {rung.name}: reserved {taken / 1e9:.3f} GB, planned {planned / 1e9:.3f} GB")
    assert 0.93 * planned <= taken <= planned


def test_the_same_latents_give_the_same_frames() -> None:
    vae, latents = random_vae(torch.bfloat16), random_latents(240, 416, 9)
    decode = partial(decode_pieces, vae, latents)
    for first, second in zip(decode(), decode(), strict=True):
        assert torch.equal(first.frames, second.frames)
