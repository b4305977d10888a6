"""The kernels without a card: in Triton's interpreter, compiled for every architecture, and their twins."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.kernels import configs, launch, tune, w8a8
from runtime.kernels.configs import Config
from runtime.kernels.gated_add import gated_add
from runtime.kernels.gelu_quantize import gelu_quantize, gelu_quantize_triton
from runtime.kernels.norm_quantize import (
    FEW,
    ROWS,
    Affine,
    Modulation,
    Residual,
    Rms,
    _together,
    norm,
    norm_quantize,
    norm_triton,
)
from runtime.kernels.norm_silu import norm_silu
from runtime.kernels.rms_rope import rms_rope
from runtime.kernels.row_quantize import row_quantize
from runtime.layers.norm import RMSNorm, norm_of
from runtime.layers.norm import gated_add as plain_gated_add
from runtime.layers.rope import apply_rope, rope_table
from runtime.linear import fp8, int8
from runtime.linear.quantize import FORMATS, quantize_rows
from runtime.vae import ChannelNorm
from tests.unit.interpreter import in_interpreter

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.slow
@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
def test_in_the_interpreter_every_kernel_is_its_twin() -> None:
    in_interpreter("kernels_in_interpreter.py")


# --- the twins are what the engine computes without kernels ---


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_quantize_is_the_linear_layers_formula(form: object, dtype: torch.dtype) -> None:
    x = randn(3, 5, 77, dtype=dtype)
    x[1, 2] = 0
    form_ = next(one for one in FORMATS.values() if one is form)
    (q, scale), (expected, expected_scale) = row_quantize(x, form_.dtype), quantize_rows(x, form_)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_the_layers(dtype: torch.dtype) -> None:
    x, branch = randn(1, 9, 64, dtype=dtype), randn(1, 9, 64, seed=1, dtype=dtype)
    shift, scale, gate = (randn(1, 1, 64, seed=seed) for seed in (2, 3, 4))
    assert torch.equal(norm(x, Modulation(shift, scale), 1e-6), norm_of(x, Modulation(shift, scale), 1e-6))
    weight, bias = randn(64, seed=5), randn(64, seed=6)
    assert torch.equal(norm(x, Affine(weight, bias), 1e-6), norm_of(x, Affine(weight, bias), 1e-6))
    for residual, expected in (
        (Residual(branch, gate), plain_gated_add(x, branch, gate)),
        (Residual(branch), x + branch),
    ):
        stream = x.clone()
        y = norm(stream, Affine(weight, bias), 1e-6, residual)
        assert torch.equal(stream, expected)
        assert torch.equal(y, norm_of(expected, Affine(weight, bias), 1e-6))
        q, row_scales = norm_quantize(x.clone(), Affine(weight, bias), 1e-6, torch.int8, residual)
        expected_q, expected_scales = row_quantize(y, torch.int8)
        assert torch.equal(q, expected_q) and torch.equal(row_scales, expected_scales)
    stream = x.clone()
    assert gated_add(stream, branch, gate) is stream
    assert torch.equal(stream, plain_gated_add(x, branch, gate))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norms_are_the_layers(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, branch = randn(1, 9, 64, dtype=dtype), randn(1, 9, 64, seed=1, dtype=dtype)
    layer = RMSNorm(64, 1e-6).requires_grad_(False)
    layer.weight.data = randn(64, seed=2, dtype=weight_dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight.double()
    y = norm(x, layer.scaling, 1e-6)
    worst = float(((y.double() - exact).abs() / exact.abs().clamp_min(1e-3)).max())
    print(f"RMSNorm of {dtype}: largest relative difference {worst:.1e}")
    assert worst <= 4 * torch.finfo(dtype).eps
    assert torch.equal(y, layer(x)) and torch.equal(y, norm_of(x, layer.scaling, 1e-6))
    stream = x.clone()
    q, scales = norm_quantize(stream, layer.scaling, 1e-6, torch.int8, Residual(branch))
    assert torch.equal(stream, x + branch)
    expected_q, expected_scales = row_quantize(layer(x + branch), torch.int8)
    assert torch.equal(q, expected_q) and torch.equal(scales, expected_scales)


def test_few_rows_have_a_program_each() -> None:
    assert _together(torch.empty(1, 512, 8)) == _together(torch.empty(FEW, 3)) == 1
    assert _together(torch.empty(FEW + 1, 3)) == _together(torch.empty(2, FEW, 3)) == ROWS > 1


def test_rms_rope_is_the_layers_in_fp32() -> None:
    grid, heads, width = (2, 3, 4), 3, 16
    x = randn(2, 24, heads * width)
    layer = RMSNorm(heads * width, 1e-6)
    layer.weight.data = randn(heads * width, seed=1)
    table = rope_table(grid, width, x)
    expected = apply_rope(layer(x).unflatten(-1, (heads, width)), table).flatten(-2)
    got = rms_rope(x.clone(), layer.weight, 1e-6, width, table)
    plain = rms_rope(x.clone(), layer.weight, 1e-6, width)
    print(f"rms_rope: largest difference {float((got - expected).detach().abs().max())}")
    assert torch.equal(got, expected) and torch.equal(plain, layer(x))


def test_gelu_quantize_is_gelu_then_quantization() -> None:
    h = randn(7, 96, dtype=torch.bfloat16)
    g = torch.nn.functional.gelu(h, approximate="tanh")
    factor = randn(7, 96, seed=1, dtype=torch.bfloat16)
    for given, rows in ((None, g), (factor, factor * g)):
        expected = row_quantize(rows, torch.int8)
        got = gelu_quantize(h, torch.int8, given)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_norm_silu_is_the_vaes() -> None:
    x = randn(2, 6, 3, 4, 5)
    layer = ChannelNorm(6)
    layer.gamma.data = randn(6, 1, 1, 1, seed=1)
    assert torch.equal(norm_silu(x, layer.gamma, silu=False), layer(x))
    expected = torch.nn.functional.silu(layer(x))
    assert torch.equal(norm_silu(x, layer.gamma), expected)
    assert torch.equal(norm_silu(x.double(), layer.gamma), torch.nn.functional.silu(layer(x.double())))
    into = torch.full((2, 12, 3, 4, 5), float("nan"))
    assert torch.equal(norm_silu(x, layer.gamma, out=into[:, 3:9]), expected)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_w8a8_is_the_linear_layers_formula(form: str, dtype: torch.dtype) -> None:
    kind = FORMATS[form]
    x, bias = randn(19, 1040, dtype=dtype), randn(48, seed=2)
    weight, weight_scale = quantize_rows(randn(48, 1040, seed=1), kind)
    q, scale = row_quantize(x, kind.dtype)
    expected = {"fp8": fp8, "int8": int8}[form].reference(x, weight, weight_scale, bias)
    assert torch.equal(w8a8.w8a8(q, weight, scale, weight_scale, bias, dtype), expected)
    gelu = torch.nn.functional.gelu(
        w8a8.w8a8(q, weight, scale, weight_scale, bias, torch.float32), approximate="tanh"
    )
    assert torch.equal(w8a8.w8a8(q, weight, scale, weight_scale, bias, dtype, gelu=True), gelu.to(dtype))


# --- what callers get wrong ---


def test_operands_that_do_not_fit_are_refused() -> None:
    q, w = torch.ones(4, 32, dtype=torch.int8), torch.ones(16, 32, dtype=torch.int8)
    s_a, s_w = torch.ones(4, 1), torch.ones(16, 1)
    for wrong in (
        lambda: w8a8.w8a8(q, w[:, :16], s_a, s_w),
        lambda: w8a8.w8a8(q, w[:15], s_a, s_w[:15]),
        lambda: w8a8.w8a8(q, w, s_a[:3], s_w),
        lambda: w8a8.w8a8(q, w.float(), s_a, s_w),
        lambda: w8a8.w8a8(q, w, s_a, s_w, torch.ones(5)),
        lambda: gelu_quantize_triton(s_a, torch.int8, s_w),
        lambda: norm_triton(s_a, Rms(torch.ones(3)), 1e-6),
    ):
        with pytest.raises(ValueError, match=r"expected|fit"):
            wrong()
    with pytest.raises(ValueError, match="contiguous"):
        launch.rows_of(torch.ones(4, 8).t())
    with pytest.raises(ValueError, match="contiguous"):
        launch.rows_of(torch.ones(4, 6, 8)[:, :3])
    with pytest.raises(ValueError, match="one per column"):
        launch.row_vector(torch.ones(3), 4, "gate")


@pytest.mark.parametrize("width", [1, 16, 17, 1000, 1536, 5120, 8960, 13824])
def test_row_parts_cover_the_row(width: int) -> None:
    main, tail = launch.row_parts(width)
    assert main <= width <= main + tail and main & (main - 1) == 0 and tail & (tail - 1) == 0
    assert main + tail < 1.2 * width or width < 32 or width in (17, 8960 * 2)


# --- choosing ---


def test_configs_in_use() -> None:
    device = torch.device("cuda", 7)
    config = Config(64, 64, 64)
    configs.use(config, device, torch.int8, 48, 80)
    assert configs.chosen(device, torch.int8, 48, 80) == config
    configs.use(None, device, torch.int8, 48, 80)
    assert (device, torch.int8, 48, 80) not in configs._used


def test_old_cards_have_no_candidates() -> None:
    assert not configs.candidates((7, 5), torch.int8, True)
    assert not configs.candidates((8, 6), launch.E4M3, True)
    assert not any(config.descriptors for config in configs.candidates((8, 9), launch.E4M3, True))
    assert not any(config.descriptors for config in configs.candidates((9, 0), launch.E4M3, False))


def test_the_fastest_candidate_wins_and_the_broken_one_is_named() -> None:
    seconds = {"slow": 9.0, "fast": 1.0, "near": 1.2}
    looked_at: list[str] = []

    def named(name: str) -> Callable[[], str]:
        return lambda: name

    def broken() -> None:
        raise RuntimeError("out of resource\nat line 3")

    def clock(run: Callable[[], object]) -> float:
        name = str(run())
        looked_at.append(name)
        return seconds[name]

    runs: dict[str, Callable[[], object]] = {name: named(name) for name in seconds}
    found = tune.time_candidates({**runs, "broken": broken}, repeats=4, clock=clock)
    assert [timing.name for timing in found] == ["fast", "near", "slow", "broken"]
    assert found[-1].milliseconds is None and found[-1].trouble == "RuntimeError: out of resource"
    assert looked_at.count("slow") == 1 and looked_at.count("near") == 5


def test_wrong_numbers_are_no_agreement() -> None:
    y = randn(8, 8)
    tune._must_agree(y.bfloat16(), y)
    for wrong in (y * 1.1, torch.full_like(y, float("nan")), torch.zeros_like(y)):
        with pytest.raises(ArithmeticError):
            tune._must_agree(wrong.bfloat16(), y)


def test_twins_can_be_forced() -> None:
    with launch.twins():
        assert not launch.fused(torch.ones(1))
        assert launch._twins_only
    assert not launch._twins_only


def test_without_triton_everything_imports_and_runs() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from runtime.kernels import launch, w8a8, norm_silu, rms_rope, gelu_quantize, norm_quantize, tune\n"
        "from runtime.kernels.row_quantize import row_quantize\n"
        "from runtime.kernels.gated_add import gated_add\n"
        "assert not launch.HAS_TRITON\n"
        "q, s = row_quantize(torch.randn(3, 32), torch.int8)\n"
        "y = w8a8.w8a8(q, q[:1].repeat(16, 1), s, s[:1].repeat(16, 1))\n"
        "gated_add(y, y.clone(), torch.randn(16))\n"
        "print(launch.trouble(torch.device('cuda', 0)), bool(y.isfinite().all()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Triton is not installed True", done.stderr
