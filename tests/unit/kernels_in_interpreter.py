"""Every kernel against its twin in Triton's interpreter, on CPU tensors; `test_kernels.py` starts this.

    TRITON_INTERPRET=1 python -m pytest tests/unit/kernels_in_interpreter.py -s

The interpreter must be asked for before Triton is imported, hence the process of its own. Its conversions to
bf16 and e4m3 truncate where the GPU rounds to nearest: here they are torch's, which round as the GPU does.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the interpreter is a part of Triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from runtime.kernels import interleave, launch, norm_silu, residual_add, tune, w8a8  # noqa: E402
from runtime.kernels.configs import Config  # noqa: E402
from runtime.kernels.gated_add import gated_add_torch, gated_add_triton  # noqa: E402
from runtime.kernels.gelu_quantize import gelu_quantize_torch, gelu_quantize_triton  # noqa: E402
from runtime.kernels.interleave import interleave_torch, interleave_triton  # noqa: E402
from runtime.kernels.norm_quantize import (  # noqa: E402
    ROWS,
    Modulation,
    Residual,
    Rms,
    norm_quantize_torch,
    norm_quantize_triton,
    norm_torch,
    norm_triton,
)
from runtime.kernels.norm_silu import norm_silu_torch, norm_silu_triton  # noqa: E402
from runtime.kernels.residual_add import residual_add_torch, residual_add_triton  # noqa: E402
from runtime.kernels.rms_rope import rms_rope_torch, rms_rope_triton  # noqa: E402
from runtime.kernels.row_quantize import row_quantize_torch, row_quantize_triton  # noqa: E402
from runtime.layers import video_blocks  # noqa: E402
from runtime.layers.tiles import WHOLE, Rung  # noqa: E402
from runtime.vae import VAEConfig  # noqa: E402
from runtime.vae_tiles import decode_pieces  # noqa: E402
from tests.kernel_cases import (  # noqa: E402
    DTYPES,
    FORMATS,
    SCALINGS,
    compare,
    poison,
    roundings,
    tokens,
    vector,
)
from tests.unit.test_vae import random_vae  # noqa: E402

assert launch.INTERPRETED, "set TRITON_INTERPRET=1"

WIDTHS = [5120, 1000, 17]


def _version(module: Any) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


@pytest.fixture(autouse=True, scope="module")
def _conversions_round_to_nearest() -> Iterator[None]:
    theirs = interpreter._convert_float
    to_bytes = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: launch.E4M3}

    def convert(values: np.ndarray, given: object, wanted: object, mode: object) -> np.ndarray:
        if given == tl.bfloat16 and wanted == tl.float32:
            return (values.astype(np.uint32) << 16).reshape(values.shape)
        if given != tl.float32 or wanted not in to_bytes:
            return theirs(values, given, wanted, mode)
        dtype = to_bytes[wanted]
        numbers = torch.from_numpy(np.ascontiguousarray(values).copy())
        if wanted == tl.float8e4nv:
            numbers = numbers.clamp(-448, 448)  # as the GPU's conversion saturates
        bits = numbers.to(dtype).view(torch.uint8 if dtype.itemsize == 1 else torch.int16).numpy()
        return bits.view(np.uint8 if dtype.itemsize == 1 else np.uint16).reshape(values.shape)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = theirs


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_quantize(form: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (*WIDTHS, 13824):
        x = tokens(7, width, dtype, width)
        expected = row_quantize_torch(x, form)
        with monkeypatch.context() as patch:
            poison(patch)
            got = row_quantize_triton(x, form)
        # exact on the GPU; an older interpreter rounds twice where the GPU fuses
        compare(f"row_quantize {width} {dtype} {form}", got, expected, rate=1e-3)
        assert not got[0][1].float().any()  # zeros stay zeros


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [3, 70, 1599])
def test_a_bad_row_stays_bad_and_spoils_no_other(form: torch.dtype, bad: float, place: int) -> None:
    x = tokens(6, 1600, torch.bfloat16, 5)
    x[5, place] = bad
    ones, more = vector(1600, 1), vector(1600, 2)
    for name, quantize in {
        "row": lambda x: row_quantize_triton(x, form),
        "gelu": lambda x: gelu_quantize_triton(x, form),
        "norm": lambda x: norm_quantize_triton(x, Modulation(ones, more), 1e-6, form),
        "rms": lambda x: norm_quantize_triton(x, Rms(ones), 1e-6, form),
        "gelu of a factor": lambda x: gelu_quantize_triton(
            more.bfloat16().expand(6, -1).contiguous(), form, x
        ),
    }.items():
        q, scale = quantize(x)
        back = q.float() * scale
        assert back[5].isnan().all(), name
        assert back[:5].isfinite().all(), name
    x = rms_rope_triton(x, ones, 1e-6, 64)
    assert x[:5].isfinite().all() and not x[5].isfinite().all()


NORMS = [  # all variants in bf16, the other dtypes in the fullest one
    *((torch.bfloat16, scaling, before) for scaling in SCALINGS for before in ("none", "gated", "plain")),
    *((dtype, "modulated", "gated") for dtype in (torch.float16, torch.float32)),
    *((dtype, "rms", "plain") for dtype in (torch.float16, torch.float32)),
]


@pytest.mark.parametrize(("dtype", "scaling", "residual"), NORMS)
def test_norm_quantize(
    dtype: torch.dtype, scaling: str, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in WIDTHS:
        x = tokens(6, width, dtype, width + 1)
        before = None
        if residual != "none":
            gate = vector(width, 5) if residual == "gated" else None
            before = Residual(tokens(6, width, dtype, width + 2), gate)
        how = SCALINGS[scaling](width, "cpu")
        for form in FORMATS:
            theirs, ours = x.clone(), x.clone()
            expected = norm_quantize_torch(theirs, how, 1e-6, form, before)
            with monkeypatch.context() as patch:
                poison(patch)
                got = norm_quantize_triton(ours, how, 1e-6, form, before, rows=ROWS)
            assert torch.equal(ours, theirs)  # the residual stream
            name = f"norm_quantize {scaling} {residual} {width} {dtype} {form}"
            eps = torch.finfo(dtype).eps
            compare(name, got, expected, rate=0.02, scale_error=max(eps, 1e-5))
        theirs, ours = x.clone(), x.clone()
        expected_y, got_y = norm_torch(theirs, how, 1e-6, before), norm_triton(ours, how, 1e-6, before)
        worst = roundings(got_y, expected_y)
        print(f"norm {scaling} {residual} {width} {dtype}: largest difference {worst:.2f} roundings")
        assert torch.equal(ours, theirs)
        assert worst <= (1.0 if dtype != torch.float32 else 60.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_rope(dtype: torch.dtype) -> None:
    for heads, head_dim in ((40, 128), (3, 64), (1, 16)):
        width, weight = heads * head_dim, vector(heads * head_dim, 1)
        angles = 10 * torch.rand(3, 1, head_dim // 2, generator=torch.Generator().manual_seed(3))
        for table in ((angles.cos(), angles.sin()), None):
            x = tokens(6, width, dtype, width).view(2, 3, width)
            expected = rms_rope_torch(x.clone(), weight, 1e-6, head_dim, table)
            elsewhere = torch.empty_like(x)
            assert rms_rope_triton(x, weight, 1e-6, head_dim, table, elsewhere) is elsewhere
            got = rms_rope_triton(x, weight, 1e-6, head_dim, table)
            assert got is x and torch.equal(got, elsewhere)
            worst = roundings(got, expected)
            print(f"rms_rope {heads}x{head_dim} {dtype}, rope {table is not None}: {worst:.2f} roundings")
            assert worst <= (1.0 if dtype != torch.float32 else 20.0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_quantize(form: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (13824, 300, 16):
        h = tokens(6, width, dtype, width)
        for factor in (None, torch.randn(6, width, generator=torch.Generator().manual_seed(9)).to(dtype)):
            expected = gelu_quantize_torch(h, form, factor)
            with monkeypatch.context() as patch:
                poison(patch)
                got = gelu_quantize_triton(h, form, factor)
            eps = max(torch.finfo(dtype).eps, 1e-6) * (1 if factor is None else 2)  # it is rounded twice
            name = f"gelu_quantize {width} {dtype} {form}, factor {factor is not None}"
            compare(name, got, expected, rate=0.02, scale_error=eps)


@pytest.mark.parametrize("together", [2, 4, 7])
def test_norms_of_rows_in_turn_are_the_same_bits(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    for width in (5120, 300, 16):
        x, branch = tokens(6, width, torch.bfloat16, 1), tokens(6, width, torch.bfloat16, 2)
        before = Residual(branch, vector(width, 5))
        for how in (Modulation(vector(width, 1), vector(width, 2)), Rms(vector(width, 3))):
            for form in FORMATS:
                alone, in_turn = (
                    (*norm_quantize_triton(ours, how, 1e-6, form, before, 0, rows), ours)
                    for rows, ours in ((1, x.clone()), (together, x.clone()))
                )
                for one, other in zip(alone, in_turn, strict=True):
                    assert torch.equal(one.float(), other.float())
            once, turns = (norm_triton(x.clone(), how, 1e-6, before, 0, rows) for rows in (1, together))
            assert torch.equal(once, turns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_add(dtype: torch.dtype) -> None:
    for count, width in ((9, 5120), (1, 1000), (17, 33)):
        x = torch.randn(count, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        branch = torch.randn(count, width, generator=torch.Generator().manual_seed(2)).to(dtype)
        gate = vector(width, 3)
        expected = gated_add_torch(x.clone(), branch, gate)
        got = gated_add_triton(x, branch, gate)
        difference = float((got.float() - expected.float()).abs().max())
        print(f"gated_add {count}x{width} {dtype}: largest difference {difference}")
        assert got is x and torch.equal(got, expected)


CONFIGS = [
    Config(16, 32, 32, group=2, warps=1, stages=2),
    Config(32, 16, 64, group=3, warps=1, stages=2),
    Config(32, 32, 32, group=2, warps=4, stages=2, descriptors=True),
]


def product_of(rows: int, columns: int, depth: int, form: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(rows + depth)
    q, w = (tune._random(shape, form, g) for shape in ((rows, depth), (columns, depth)))
    s_a, s_w = (torch.rand(count, 1, generator=g) * 2 * depth**-0.5 for count in (rows, columns))
    return q, w, s_a, s_w, torch.randn(columns, generator=g)


@pytest.mark.skipif(
    _version(triton) < (3, 7) and _version(np) >= (2, 4),
    reason="this Triton's interpreter takes an array of one element for a number, which numpy 2.4 refuses",
)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_w8a8(config: Config, form: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if config.descriptors and not launch.HAS_DESCRIPTORS:
        pytest.skip("this Triton has no descriptors")
    for rows, columns, depth in ((1, 16, 16), (67, 48, 80), (33, 80, 208)):
        given = product_of(rows, columns, depth, form)
        for out_dtype, gelu, bias in ((torch.float32, False, True), (torch.bfloat16, True, False)):
            operands = (*given[:4], given[4] if bias else None)
            with monkeypatch.context() as patch:
                poison(patch)
                got = w8a8.w8a8_triton(*operands, out_dtype, gelu, False, config)
            expected = w8a8.w8a8_torch(*operands, out_dtype, gelu)
            worst = roundings(got, expected)
            print(f"w8a8 {config} {form} {rows}x{depth}->{columns} {out_dtype}: {worst:.2f} roundings")
            assert got.dtype == out_dtype and got.shape == (rows, columns)
            place = torch.full((2 * rows, columns), 7.0, dtype=out_dtype)[rows:]
            assert w8a8.w8a8_triton(*operands, out_dtype, gelu, False, config, place) is place
            assert torch.equal(place, got)
            assert worst <= (1.0 if out_dtype != torch.float32 else 8.0)
            if form == torch.int8 and out_dtype == torch.float32:
                assert torch.equal(got, expected)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_silu(dtype: torch.dtype, silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for channels, size in ((96, (3, 5, 7)), (384, (2, 3)), (4, (1, 1)), (33, (40,))):
        g = torch.Generator().manual_seed(channels)
        x = torch.randn(2, channels, *size, generator=g).mul(3).to(dtype)
        x[:, :, 0] = 0
        gamma = vector(channels, 1)
        expected = norm_silu_torch(x, gamma, silu)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        wider = torch.full((2, channels + 5, *size), float("nan"), dtype=dtype)
        among = wider[:, 3 : 3 + channels]
        with monkeypatch.context() as patch:
            poison(patch)
            results = {
                "channels first": norm_silu_triton(x, gamma, silu),
                "channels last": norm_silu_triton(last, gamma, silu),
                "into a view": norm_silu_triton(last, gamma, silu, out=among),
            }
            results["in place"] = norm_silu_triton(last, gamma, silu, out=last)
        assert wider[:, :3].isnan().all() and wider[:, 3 + channels :].isnan().all()
        for name, got in results.items():
            worst = roundings(got.movedim(1, -1), expected.movedim(1, -1))
            print(f"norm_silu {channels} {size} {dtype} silu {silu}, {name}: {worst:.2f} roundings")
            assert worst <= (1.0 if dtype != torch.float32 else 20.0)


def crop(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers (B, C, H, W), channels last: a rectangle cut out of a larger picture."""
    g = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    whole = torch.randn(batch, height + 3, width + 5, channels, generator=g).mul(3).to(dtype)
    return whole[:, 1 : height + 1, 2 : width + 2].movedim(-1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_silu_of_a_crop_with_a_bias(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((2, 96, 3, 7), (1, 40, 5, 1), (1, 384, 1, 9)):
        x, bias, gamma = crop(shape, dtype, 1), vector(shape[1], 2).to(dtype), vector(shape[1], 3)
        expected = norm_silu_torch(x, gamma, bias=bias)
        wider = torch.full((shape[0], *shape[2:], 3 * shape[1]), float("nan"), dtype=dtype).movedim(-1, 1)
        among = wider[:, shape[1] : 2 * shape[1]]
        norm_silu_triton(x, gamma, out=among, bias=bias)
        worst = roundings(among.movedim(1, -1), expected.movedim(1, -1))
        print(f"norm_silu of a crop {shape} {dtype}: {worst:.2f} roundings")
        assert worst <= (1.0 if dtype != torch.float32 else 20.0)
        assert int(wider.isnan().sum()) == 2 * among.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_add(dtype: torch.dtype) -> None:
    for shape in ((2, 96, 13, 7), (1, 8, 5, 6), (1, 33, 40, 1), (1, 3, 1, 1)):
        y, bias = crop(shape, dtype, 4).contiguous(memory_format=torch.channels_last), vector(shape[1], 5)
        for name, x in (("whole", y.neg()), ("crop", crop(shape, dtype, 6))):
            if name == "crop" and shape[3] == 1:
                continue  # a column of a picture: its pixels do not lie together, and the twin runs
            expected = residual_add_torch(y.clone(), x, bias)
            assert torch.equal(residual_add_triton(y.clone(), x, bias), expected), (shape, name)
    with pytest.raises(ValueError, match="channels last"):
        residual_add_triton(torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3), torch.randn(4))
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 2\)"):
        residual_add_triton(torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 2), torch.randn(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interleave(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch, channels, height, width in ((2, 96, 3, 5), (1, 7, 20, 18), (1, 1, 1, 1)):
        y = crop((batch, 4 * channels, height + 1, width + 1), dtype, 7)
        y, bias = y.contiguous(memory_format=torch.channels_last), vector(channels, 8).to(dtype)
        for given in (None, bias):
            expected = interleave_torch(y, given)
            with monkeypatch.context() as patch:
                patch.setattr(interleave, "_empty", lambda y, made=expected: torch.full_like(made, torch.nan))
                assert torch.equal(interleave_triton(y, given), expected)
        i, j, c = height - 1, width - 1, channels - 1
        last = y[..., i + 1, j + 1].unflatten(1, (4, channels))[:, 3, c]
        assert torch.equal(interleave_torch(y)[:, c, 2 * i + 1, 2 * j + 1], last)
    with pytest.raises(ValueError, match="channels last"):
        interleave_triton(torch.randn(1, 8, 3, 3))


def test_a_decode_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: all kernels of the decoder together, whole and in tiles, against the slow twin."""
    vae = random_vae(VAEConfig(base_dim=4)).requires_grad_(False)
    latents = torch.randn(1, 16, 2, 3, 5, generator=torch.Generator().manual_seed(9))
    expected = vae.decode(latents, chunked=False)
    for module in (interleave, norm_silu, residual_add, video_blocks):
        monkeypatch.setattr(module, "fused", lambda x: True)
    for rung in (WHOLE, Rung("", 0, 1, 2)):
        for piece in decode_pieces(vae, latents, rung):
            count, height, width = piece.frames.shape[2:]
            theirs = expected[:, :, piece.first :, piece.top :, piece.left :][..., :count, :height, :width]
            difference = float((piece.frames - theirs).abs().max())
            print(f"{rung.name or 'tiles'}, {piece[1:]}: max diff {difference:.2e}")
            assert difference <= 1e-5
