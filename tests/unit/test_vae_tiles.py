"""The decode by single frames and tiles against the whole decode: every form, every rung, seams, margins."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.layers import tiles, video_blocks
from runtime.layers.causal_conv import CausalConv3d, Rings
from runtime.layers.tiles import EVERYWHERE, WHOLE, Rung, Span, crops, cuts, halos, spans
from runtime.layers.video_blocks import ChannelNorm, FrameStep, Upsample
from runtime.vae import VAE, Decoder, VAEConfig
from runtime.vae_tiles import decode_pieces
from tests.unit.test_vae import largest, random_vae

CONFIG = VAEConfig(base_dim=4)
RUNGS = [
    WHOLE,
    *(Rung("", split, *cut) for split in (0, 1) for cut in [(1, 2), (3, 2), (2, 5)]),
    Rung("", 2, 2, 2),
]


@pytest.fixture(scope="module")
def vae() -> VAE:
    return random_vae(CONFIG).requires_grad_(False)


def random_latents(*shape: int, seed: int = 0) -> Tensor:
    """Latents of (batch, latent frames, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], 16, *shape[1:], generator=generator)


def assembled(vae: VAE, latents: Tensor, rung: Rung = WHOLE) -> Tensor:
    """All pieces where they belong; what no piece covers is NaN, and no pixel is covered twice."""
    batch, _, length, height, width = latents.shape
    video = latents.new_full((batch, 3, 4 * length - 3, 8 * height, 8 * width), torch.nan)
    count = 0
    for piece in decode_pieces(vae, latents, rung):
        frames, rows, columns = piece.frames.shape[2:]
        where = video[
            ...,
            piece.first : piece.first + frames,
            piece.top : piece.top + rows,
            piece.left : piece.left + columns,
        ]
        assert where.isnan().all()
        where.copy_(piece.frames)
        count += 1
    assert count == rung.pieces(length, height, width)
    return video


# --- the same frames


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_biases_are_left_to_the_kernels_it_is_the_same(vae, dtype, monkeypatch):
    """The way of a GPU, on the kernels' twins; with the kernels: kernels_in_interpreter.py, tests/gpu."""
    vae = random_vae(CONFIG).to(dtype).requires_grad_(False)
    latents = random_latents(2, 2, 3, 4).to(dtype)
    expected = vae.decode(latents, chunked=False)
    monkeypatch.setattr(video_blocks, "one_pass", lambda x: True)
    for rung in (WHOLE, Rung("", 0, 2, 2), Rung("", 1, 1, 2)):
        difference = largest(assembled(vae, latents, rung) - expected)
        print(f"{rung}, {dtype}: max diff {difference:.2e}")
        assert difference <= (1e-5 if dtype == torch.float32 else 1e-13)
    assert 0.05 < expected.std() < 1


@pytest.mark.parametrize("rung", RUNGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 7, 11), (1, 1, 3, 13), (2, 2, 1, 2)], ids=str)
def test_every_rung_equals_the_slow_twin(vae, rung, shape):
    latents = random_latents(*shape, seed=sum(shape))
    expected = vae.decode(latents, chunked=False)
    difference = largest(assembled(vae, latents, rung) - expected)
    print(f"{rung}, latents {shape}: max diff {difference:.2e}")
    assert difference <= 1e-5


def test_seams_are_as_exact_as_the_rest():
    vae, latents = random_vae(CONFIG).double().requires_grad_(False), random_latents(1, 2, 6, 20).double()
    expected = vae.decode(latents, chunked=False)
    for split in (0, 1, 2):
        difference = (assembled(vae, latents, Rung("", split, 1, 2)) - expected).abs()  # cut at pixel 80
        seam, rest = largest(difference[..., 79:81]), largest(difference)
        print(f"split {split}: at the seam {seam:.1e}, anywhere {rest:.1e}, in float64")
        assert rest <= 1e-13


def local_steps(split: int) -> list[int]:
    """The steps from the Upsample `split` on that look to their sides.

    Not those where a pixel less is the same margin, in whole pixels of a grid half as fine.
    """
    steps = random_vae(CONFIG).decoder.frame_steps(split)[1]

    def margins_without(number: int) -> list[int]:
        shorter = replace(steps[number], reach=steps[number].reach - 1)
        return halos([*steps[:number], shorter, *steps[number + 1 :]])

    return [n for n, step in enumerate(steps) if step.reach and margins_without(n) != halos(steps)]


@pytest.mark.parametrize(("split", "number"), [(s, n) for s in (0, 1) for n in local_steps(s)])
def test_a_pixel_less_of_margin_is_not_exact(split, number, monkeypatch):
    """Each step's reach is the smallest that gives the whole decode's frames."""
    vae, latents = random_vae(CONFIG).double().requires_grad_(False), random_latents(1, 2, 3, 22).double()
    expected = vae.decode(latents, chunked=False)
    true_steps = Decoder.frame_steps

    def short_sighted(decoder: Decoder, split: int | None = None) -> tuple[list[FrameStep], list[FrameStep]]:
        first, steps = true_steps(decoder, split)
        steps[number] = replace(steps[number], reach=steps[number].reach - 1)
        return first, steps

    monkeypatch.setattr(Decoder, "frame_steps", short_sighted)
    difference = largest(assembled(vae, latents, Rung("", split, 1, 2)) - expected)
    print(f"split {split}, step {number} with one pixel less: max diff {difference:.1e}")
    assert difference > 1e-11  # thin: it comes through the corners of as many kernels as are left


def test_margins_of_the_published_decoder():
    with torch.device("meta"):
        decoder = VAE(VAEConfig(), encoder=False).decoder
    for split, margin in ((0, 7), (1, 6), (2, 4)):
        assert halos(decoder.frame_steps(split)[1])[0] == margin
    reaches = [step.reach for step in decoder.frame_steps()[1]]
    assert reaches.count(EVERYWHERE) == 1  # attention, before the first Upsample


def test_bf16_is_as_close_to_fp32_as_the_slow_twin():
    vae, latents = random_vae(VAEConfig(base_dim=16)).requires_grad_(False), random_latents(1, 3, 6, 7)
    exact = vae.decode(latents, chunked=False)
    vae.bfloat16()
    distances = {
        name: ((frames - exact).norm() / exact.norm()).item()
        for name, frames in {
            "slow": vae.decode(latents, chunked=False),
            "whole": assembled(vae, latents),
            "2x2": assembled(vae, latents, Rung("", 0, 2, 2)),
        }.items()
    }
    print("bf16 to fp32, relative:", {name: f"{distance:.2e}" for name, distance in distances.items()})
    assert 1e-4 < distances["slow"] < 0.05
    assert max(distances.values()) <= 1.1 * distances["slow"]


# --- what it promises


def test_pieces_of_the_whole_picture_come_in_time():
    vae, latents = random_vae(CONFIG), random_latents(1, 3, 2, 3)
    pieces = [*decode_pieces(vae, latents)]  # gradients are on here, and wanted by the parameters
    assert [(piece.frames.shape[2], *piece[1:]) for piece in pieces] == [
        (1, 0, 0, 0),
        (4, 1, 0, 0),
        (4, 5, 0, 0),
    ]
    assert not any(piece.frames.requires_grad for piece in pieces)
    assert all(piece.frames.dtype == torch.float32 and piece.frames.is_contiguous() for piece in pieces)


def test_pieces_of_tiles_come_tile_by_tile(vae):
    pieces = [*decode_pieces(vae, random_latents(1, 2, 4, 3), Rung("", 0, 2, 1))]
    assert [piece[1:] for piece in pieces] == [(0, 0, 0), (1, 0, 0), (0, 16, 0), (1, 16, 0)]
    assert {tuple(piece.frames.shape[3:]) for piece in pieces} == {(16, 24)}


def test_frames_are_clamped(vae):
    loud = random_vae(CONFIG).requires_grad_(False)
    loud.decoder.head[2].weight.mul_(10)
    latents = random_latents(1, 2, 3, 2)
    frames = assembled(loud, latents)
    assert frames.abs().max() == 1
    assert largest(frames - loud.decode(latents, chunked=False)) <= 1e-5


def test_passes_may_interleave_and_break_off(vae):
    first, second = random_latents(1, 3, 3, 2, seed=1), random_latents(1, 3, 3, 2, seed=2)
    next(decode_pieces(vae, first))
    pairs = [*zip(decode_pieces(vae, first), decode_pieces(vae, second), strict=True)]
    for number, latents in enumerate((first, second)):
        assert torch.equal(torch.cat([pair[number].frames for pair in pairs], dim=2), assembled(vae, latents))


def test_weights_in_another_layout_give_the_same(vae):
    latents, expected = random_latents(1, 2, 4, 3), None
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        copy = random_vae(CONFIG).requires_grad_(False)
        for parameter in copy.decoder.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.to(memory_format=layout)
        frames = assembled(copy, latents)
        expected = frames if expected is None else expected
        assert largest(frames - expected) <= 1e-6


@pytest.mark.parametrize(
    ("split", "rows", "columns", "words"),
    [(None, 1, 2, "1x2 tiles without"), (0, 0, 2, "0x2 tiles.*1 or more")],
)
def test_tilings_that_cannot_be_are_refused(split, rows, columns, words):
    with pytest.raises(ValueError, match=words):
        Rung("", split, rows, columns)


def test_refused_at_the_call(vae):
    with pytest.raises(ValueError, match="Upsample 3, expected 0 to 2"):
        decode_pieces(vae, random_latents(1, 1, 2, 2), Rung("", 3, 1, 2))
    with pytest.raises(ValueError, match=r"\(1, 15, 1, 2, 2\)"):
        decode_pieces(vae, torch.rand(1, 15, 1, 2, 2))


# --- its parts


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (5, 3, 3)], ids=str)
@torch.no_grad()
def test_a_ring_is_the_convolution_over_time(kernel):
    generator = torch.Generator().manual_seed(1)
    conv = CausalConv3d(3, 5, kernel).double()
    for parameter in conv.parameters():
        parameter.normal_(generator=generator)
    x = torch.randn(2, 3, 8, 4, 6, generator=generator, dtype=torch.float64)
    rings = Rings()
    frames = torch.stack([conv.next_frame(frame, rings) for frame in x.unbind(2)], dim=2)
    difference = largest(frames - conv(x))
    print(f"kernel {kernel}: max diff {difference:.2e}")
    assert difference <= 1e-12


@pytest.mark.parametrize("band_bytes", [1, 6 * 7 * 4 * 2, 1 << 30])
@pytest.mark.parametrize("with_bias", [False, True])
@torch.no_grad()
def test_norm_and_silu_in_bands_are_the_two(band_bytes, with_bias, monkeypatch):
    monkeypatch.setattr(tiles, "BAND_BYTES", band_bytes)
    generator = torch.Generator().manual_seed(3)
    norm = ChannelNorm(6)
    norm.gamma.uniform_(-2, 2, generator=generator)
    bias = torch.randn(6, generator=generator) if with_bias else None
    x = torch.randn(1, 6, 5, 7, generator=generator)
    x[:, :, 2, 3] = 0
    given, out = x.clone(), torch.full((1, 5, 7, 18), torch.nan).movedim(-1, 1)[:, 6:12]
    norm.silu_into(x, out, bias)
    added = x if bias is None else x + bias.view(-1, 1, 1)
    difference = largest(out - F.silu(norm(added.unsqueeze(2))).squeeze(2))
    print(f"bands of {band_bytes} bytes, bias {with_bias}: max diff {difference:.2e}")
    assert difference <= 1e-6
    assert torch.equal(x, given)


@pytest.mark.parametrize("shape", [(1, 6, 5, 7), (2, 4, 1, 3), (1, 2, 1, 1)], ids=str)
@torch.no_grad()
def test_enlarging_is_nearest_and_the_convolution(shape):
    """Also where the picture ends: the padding of the small picture is that of the enlarged one."""
    generator = torch.Generator().manual_seed(sum(shape))
    layer = Upsample(shape[1], temporal=False).double()
    for parameter in layer.parameters():
        parameter.normal_(generator=generator)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = layer(x.unsqueeze(2)).squeeze(2)
    difference = largest(layer.enlarge(x, Rings())[0] - expected)
    print(f"{shape}: max diff {difference:.1e}, in float64")
    assert difference <= 1e-13


@given(st.integers(1, 200), st.integers(1, 30))
def test_cuts_cover_the_length_evenly(length, parts):
    found = cuts(length, parts)
    assert [pixel for span in found for pixel in range(span.start, span.stop)] == [*range(length)]
    assert len(found) == min(parts, length)
    assert max(map(len, found)) - min(map(len, found)) <= 1


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=8),
    st.integers(1, 40),
    st.data(),
)
def test_a_tile_is_all_that_its_layers_need(sizes, length, data):
    """Each layer gets the pixels that its output is made of, those in the picture, and no others."""
    layers = [FrameStep(lambda x, _: (x,), reach, scale) for reach, scale in sizes]
    start = data.draw(st.integers(0, length - 1))
    tile = Span(start, data.draw(st.integers(start + 1, length)))
    entering = spans(tile, length, layers)
    held, last = Span(0, length), length - 1  # what the layer before made; the picture's last pixel
    for layer, span, after, part in zip(
        layers, entering, entering[1:], crops(entering, layers), strict=False
    ):
        last = (last + 1) * layer.scale - 1
        needed = [max(after.start - layer.reach, 0), min(after.stop - 1 + layer.reach, last)]
        assert span == Span(needed[0] // layer.scale, needed[1] // layer.scale + 1)
        assert span == Span(held.start + part.start, held.start + part.stop)
        held = span.times(layer.scale)
    result = crops(entering, layers)[-1]
    assert Span(held.start + result.start, held.start + result.stop) == entering[-1]
    assert entering[-1] == tile.times(math.prod(layer.scale for layer in layers))
