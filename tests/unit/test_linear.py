"""8-bit Linears against an independent evaluation of their formula in float64, and what swapping does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from runtime.errors import WeightsError
from runtime.kernels.row_quantize import row_scales, to_levels
from runtime.linear import Fp8Linear, Int8Linear, QuantizedLinear, forced_way, fp8, int8, module, swap_linears
from runtime.linear.quantize import FORMATS, dequantize, quantize_rows, quantize_weight

CLASSES: dict[str, type[QuantizedLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear}
REFERENCES: dict[str, Callable[..., Tensor]] = {"fp8": fp8.reference, "int8": int8.reference}
QMAX = {"fp8": 448.0, "int8": 127.0}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def e4m3_values() -> Tensor:
    """All finite e4m3 numbers, from the definition: sign, exponent (bias 7), mantissa of three bits."""
    small = [m * 2.0**-9 for m in range(8)]
    normal = [(8 + m) / 8 * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    positive = torch.tensor(small + normal, dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive[1:]])


def nearest(x: Tensor, form: str) -> Tensor:
    """x in float64 rounded to the format's numbers, ties to the even one; independent of torch's casts."""
    if form == "int8":
        return torch.round(x).clamp(-127, 127)
    values = e4m3_values()
    high = torch.searchsorted(values, x.clamp(-448, 448)).clamp(1, len(values) - 1)
    below, above = x - values[high - 1], values[high] - x
    even_high = (high + 1) % 2 == 0  # zero has index 126: a value's last mantissa bit is its index's parity
    up = (above < below) | ((above == below) & ~even_high)
    return torch.where(up, values[high], values[high - 1])


def formula(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """The forward in float64; only scale and quotient are fp32, because what is rounded depends on them."""
    rows = x.reshape(-1, x.shape[-1]).float()
    absmax = rows.abs().max(dim=1, keepdim=True).values
    s_a = torch.where(absmax == 0, 1.0, absmax / QMAX[form])
    q = nearest((rows / s_a).double(), form)
    y = q @ weight.double().t() * s_a.double() * scale.double().t()
    y = y if bias is None else y + bias.double()
    return y.reshape(*x.shape[:-1], -1)


def make(
    form: str, out: int, into: int, seed: int, bias: bool = True, dtype: Any = torch.float32
) -> QuantizedLinear:
    g = torch.Generator().manual_seed(seed)
    linear = CLASSES[form](into, out, bias)
    linear.weight, linear.weight_scale = quantize_weight(torch.randn(out, into, generator=g), FORMATS[form])
    if bias:
        linear.bias = torch.randn(out, generator=g).to(dtype)
    return linear


def distance(y: Tensor, expected: Tensor) -> float:
    """Largest error in units of y's rounding, at the size of the entry or of the mean if larger."""
    eps = torch.finfo(y.dtype).eps
    size = expected.abs().clamp_min(expected.abs().mean())
    return float(((y.double() - expected).abs() / (eps * size)).max())


SHAPES = [(1, 64), (7, 64), (2, 3, 64), (1, 1, 1, 64), (0, 64), (64,), (33, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", CLASSES)
def test_forward_is_the_formula(form: str, dtype: str, shape: tuple[int, ...]) -> None:
    linear = make(form, 24, 64, seed=sum(shape))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(61)).to(DTYPES[dtype])
    y = linear(x)
    assert y.dtype == DTYPES[dtype] and y.shape == (*shape[:-1], 24)
    if x.numel():
        d = distance(y, formula(x, linear.weight, linear.weight_scale, linear.bias, form))
        print(f"{form} {dtype} {shape}: max diff {d:.2f} roundings")
        assert d < (
            8 if dtype == "fp32" else 0.51
        )  # fp32: a few of its own steps; else the one rounding, half a step


@pytest.mark.parametrize("form", CLASSES)
def test_large_sums_stay_exact(form: str) -> None:
    """int8 sums leave fp32's integers (2^24) here: extreme entries of one sign over 5000 terms."""
    linear = make(form, 8, 5003, seed=62, bias=False)
    linear.weight = torch.full((8, 5003), 127).to(linear.weight.dtype)
    linear.weight[:, ::7] = torch.tensor(125).to(
        linear.weight.dtype
    )  # int8: sums that are odd multiples of few twos
    x = torch.ones(3, 5003)
    x[:, 1::3] = 0.9921875  # 127 and 126 of int8
    d = distance(linear(x), formula(x, linear.weight, linear.weight_scale, None, form))
    print(f"{form}: max diff {d:.2f} fp32 roundings")
    assert d < (2 if form == "int8" else 60)
    if form == "int8":
        q, _ = quantize_rows(x, FORMATS["int8"])
        exact = q.long() @ linear.weight.long().t()
        assert exact.max() > 2**24
        assert torch.equal(int8.exact_product(q, linear.weight).long(), exact)


@pytest.mark.parametrize("form", CLASSES)
def test_zero_rows_give_the_bias(form: str) -> None:
    linear = make(form, 24, 64, seed=63)
    x = torch.randn(5, 64)
    x[1], x[3] = 0.0, -0.0
    y = linear(x)
    assert linear.bias is not None
    assert torch.equal(y[1], linear.bias) and torch.equal(y[3], linear.bias)
    assert torch.isfinite(y).all() and not torch.equal(y[0], linear.bias)


@pytest.mark.parametrize("size", [1e-18, 1e18])
@pytest.mark.parametrize("form", CLASSES)
def test_rows_of_any_size_are_scaled_alone(form: str, size: float) -> None:
    linear = make(form, 24, 64, seed=64, bias=False)
    x = torch.randn(4, 64)
    x[2] *= size
    y = linear(x)
    assert distance(y, formula(x, linear.weight, linear.weight_scale, None, form)) < 60
    assert torch.equal(y[[0, 1, 3]], linear(x[[0, 1, 3]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", CLASSES)
def test_a_broken_row_stays_visible_and_alone(form: str, bad: float) -> None:
    linear = make(form, 24, 64, seed=65)
    x = torch.randn(3, 64)
    x[1, 5] = bad
    y = linear(x)
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("form", CLASSES)
def test_layout_of_x_and_slices_do_not_matter(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make(form, 24, 64, seed=66)
    x = torch.randn(64, 600, generator=torch.Generator().manual_seed(67)).bfloat16()
    whole = linear(x.t().contiguous())
    assert torch.equal(linear(x.t()), whole)
    wide = torch.zeros(600, 128).bfloat16()
    wide[:, ::2] = x.t()
    assert torch.equal(linear(wide[:, ::2]), whole)
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 1)  # 256 rows at a time
    assert torch.equal(linear(x.t()), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", CLASSES)
def test_bias_is_added_in_its_own_precision(form: str, dtype: str) -> None:
    linear = make(form, 24, 64, seed=68, dtype=DTYPES[dtype])
    x = torch.randn(9, 64)
    assert distance(linear(x), formula(x, linear.weight, linear.weight_scale, linear.bias, form)) < 8
    linear.bias = None
    assert distance(linear(x), formula(x, linear.weight, linear.weight_scale, None, form)) < 60


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", CLASSES)
def test_dequantized_way_is_the_product_with_w(form: str, dtype: str) -> None:
    """Weight-only: no rounding of x, W rounded once to x's dtype."""
    linear = make(form, 24, 64, seed=69)
    x = torch.randn(5, 64).to(DTYPES[dtype])
    with forced_way("dequantized"):
        y = linear(x)
    w = dequantize(linear.weight, linear.weight_scale).double()
    assert linear.bias is not None
    expected = x.double() @ w.t() + linear.bias.double()
    error = float((y.double() - expected).norm() / expected.norm())
    print(f"{form} {dtype}: relative RMS difference {error:.2e}")
    assert error < 2 * torch.finfo(y.dtype).eps


def test_integer_way_equals_the_reference() -> None:
    """torch._int_mm exists on the CPU too, so the padding and the layout of that way are held here."""
    linear = make("int8", 24, 64, seed=70)
    for rows in (1, 16, 31, 32, 33):
        x = torch.randn(rows, 64).bfloat16()
        with forced_way("integer"):
            y = linear(x)
        assert torch.equal(y, linear(x))


@pytest.mark.parametrize("form", CLASSES)
def test_rms_error_of_gaussian_rows(form: str) -> None:
    """Rows of 5120: .9 % of the row's RMS for int8, 2.7 % for fp8 (spec of the published files)."""
    w = torch.randn(64, 5120, generator=torch.Generator().manual_seed(71)) * 0.02
    q, scale = quantize_weight(w, FORMATS[form])
    error = (dequantize(q, scale) - w).pow(2).mean(1).sqrt() / w.pow(2).mean(1).sqrt()
    print(f"{form}: RMS error per row {error.mean():.4f} ({error.min():.4f} to {error.max():.4f})")
    low, high = {"fp8": (0.025, 0.028), "int8": (0.0075, 0.0105)}[form]
    assert low < float(error.mean()) < high


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    row=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    form=st.sampled_from(["fp8", "int8"]),
)
def test_quantization_rounds_to_nearest_even(row: list[float], form: str) -> None:
    x = torch.tensor([row])
    q, scale = quantize_rows(x, FORMATS[form])
    assert q.dtype == FORMATS[form].dtype and scale.dtype == torch.float32
    assert torch.equal(q.double(), nearest((x / scale).double(), form))
    assert torch.equal(scale, row_scales(x, FORMATS[form].dtype)) and bool(scale > 0)


def test_ties_go_to_even() -> None:
    scale = torch.ones(1, 1)
    ties = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])

    assert to_levels(ties, scale, torch.int8).tolist() == [[0, 2, 2, 0, -2, 126]]
    assert to_levels(ties * 200, scale, torch.int8).tolist() == [[100, 127, 127, -100, -127, 127]]
    ties = torch.tensor([[17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 500.0, -1e9]])
    found = to_levels(ties, scale, torch.float8_e4m3fn).float().tolist()
    assert found == [[16.0, 20.0, -16.0, 0.0, 2.0**-8, 448.0, -448.0]]


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("form", CLASSES)
def test_weights_are_divided_by_the_scale_that_is_stored(form: str, scale_dtype: str) -> None:
    w = torch.randn(6, 32)
    w[2] = 0
    w[4] *= 1e-7
    q, scale = quantize_weight(w, FORMATS[form], DTYPES[scale_dtype])
    assert scale.dtype == DTYPES[scale_dtype] and scale.shape == (6, 1)
    absmax = w.abs().amax(1, keepdim=True).clamp_min(1e-5)
    wanted = (absmax / QMAX[form]).to(DTYPES[scale_dtype])
    assert torch.equal(scale, torch.where(wanted == 0, 2.0**-24, wanted).to(scale.dtype))
    assert torch.equal(q.double(), nearest((w / scale.float()).double(), form))
    assert not q[2].float().any()


def tree() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(
            nn.Linear(16, 32), nn.ModuleList([nn.Linear(32, 16, bias=False)]), nn.LayerNorm(16)
        )


def test_swap_replaces_what_is_named() -> None:
    model = tree()
    swap_linears(model, {"0": "fp8", "1.0": "int8"})
    first, second = model[0], model[1][0]  # type: ignore[index]
    assert isinstance(first, Fp8Linear) and isinstance(second, Int8Linear)
    assert {name: (tuple(t.shape), t.dtype, t.device.type) for name, t in model.state_dict().items()} == {
        "0.weight": ((32, 16), torch.float8_e4m3fn, "meta"),
        "0.weight_scale": ((32, 1), torch.float32, "meta"),
        "0.bias": ((32,), torch.float32, "meta"),
        "1.0.weight": ((16, 32), torch.int8, "meta"),
        "1.0.weight_scale": ((16, 1), torch.float32, "meta"),
        "2.weight": ((16,), torch.float32, "meta"),
        "2.bias": ((16,), torch.float32, "meta"),
    }
    assert "in_features=16, out_features=32, bias=True, fp8" in repr(model)


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        ({"0": "fp8", "9": "fp8"}, "hold 9 quantized, which is not a layer"),
        ({"0": "fp8", "2": "fp8"}, "hold 2 quantized, which is LayerNorm"),
        ({"0": "int4"}, "Format int4 is not supported"),
    ],
)
def test_swap_refuses_and_changes_nothing(formats: dict[str, str], said: str) -> None:
    model = tree()
    with pytest.raises(WeightsError, match=said):
        swap_linears(model, formats)
    assert type(model[0]) is nn.Linear  # type: ignore[index]


@pytest.mark.parametrize("form", CLASSES)
def test_casts_are_refused_and_moves_are_not(form: str) -> None:
    linear = make(form, 24, 64, seed=72)
    weight = linear.weight.clone()
    assert torch.equal(linear.to("cpu").weight.view(torch.uint8), weight.view(torch.uint8))
    with pytest.raises(TypeError, match=f"{form} weights and their scales cannot be cast"):
        linear.to(torch.bfloat16)
    with pytest.raises(TypeError, match=form):
        make(form, 24, 64, seed=72).half()


def test_first_working_way() -> None:
    def raises(device: torch.device) -> bool:
        raise RuntimeError("no kernel image")

    cpu = torch.device("cpu")
    ways: dict[str, Callable[[torch.device], bool]] = {"a": raises, "b": lambda d: False, "c": lambda d: True}
    assert module.first_working(cpu, ways, "d") == "c"
    ways.pop("c")
    assert module.first_working(cpu, ways, "d") == "d"


@pytest.mark.parametrize("form", CLASSES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_reference_is_what_the_module_computes_on_a_cpu(form: str, dtype: str) -> None:
    linear = make(form, 24, 64, seed=73)
    x = torch.randn(40, 64).to(DTYPES[dtype])
    y = REFERENCES[form](x, linear.weight, linear.weight_scale, linear.bias)
    assert y.dtype == x.dtype and torch.equal(y, linear(x))
