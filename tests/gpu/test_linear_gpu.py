"""Every way in which the GPU multiplies 8-bit weights, against the formula in float64; prints distances.

pytest -m gpu tests/gpu/test_linear_gpu.py -s
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from runtime.kernels.prepared import Prepared
from runtime.kernels.row_quantize import row_quantize
from runtime.linear import Fp8Linear, Int8Linear, QuantizedLinear, forced_way, fp8, int8
from runtime.linear.quantize import FORMATS, dequantize, quantize_rows, quantize_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]

CUDA = torch.device("cuda", 0)
CLASSES: dict[str, type[QuantizedLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear}
WAYS = {"fp8": ("rowwise", "unscaled", "reference"), "int8": ("integer", "reference")}
ROWS = (1, 2, 15, 16, 17, 31, 33, 512, 1001)
# Largest error of a sum, relative to its entry. Hopper's fp8 units keep about 14 bits between additions even
# without fast accumulation: 2.8e-3 was measured on an H200 at K = 13,824. int8 sums are exact.
ACCUMULATION = {"fp8": 4e-3, "int8": 0.0}
SIZES = ((64, 48), (256, 768), (5120, 1536), (13824, 640))  # (in, out)


def make(form: str, into: int, out: int, bias: torch.dtype | None, seed: int = 0) -> QuantizedLinear:
    g = torch.Generator().manual_seed(seed)
    linear = CLASSES[form](into, out, bias is not None)
    weight = torch.randn(out, into, generator=g) * into**-0.5
    linear.weight, linear.weight_scale = quantize_weight(weight, FORMATS[form])
    if bias is not None:
        linear.bias = torch.randn(out, generator=g).to(bias)
    return linear.to(CUDA)


def rows_of(count: int, into: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Tokens of different sizes with a few outliers, as activations have them; one row of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, into, generator=g) * torch.rand(count, 1, generator=g).mul(4)
    x[:, :: max(into // 7, 1)] *= 6
    if count > 2:
        x[count // 2] = 0
    return x.to(dtype).to(CUDA)


def formula(linear: QuantizedLinear, x: Tensor) -> Tensor:
    """The forward in float64 on q and scale that the CPU computed."""
    q, scale = quantize_rows(x.cpu(), linear.form)
    y = q.to(CUDA).double() @ linear.weight.double().t()
    y = y * scale.to(CUDA).double() * linear.weight_scale.double().t()
    return y if linear.bias is None else y + linear.bias.double()


def distance(y: Tensor, expected: Tensor) -> float:
    """Largest difference in units of y's rounding, at the size of the entry or of the mean if larger."""
    size = expected.abs().clamp_min(expected.abs().mean())
    return float(((y.double() - expected).abs() / (torch.finfo(y.dtype).eps * size)).max())


def skip_without(form: str, way: str) -> None:
    """Skip a way that this card lacks; the one that was chosen for it must never be skipped."""
    best = {"fp8": fp8._device_way, "int8": int8._device_way}[form](CUDA)
    trials: dict[str, Callable[[torch.device], bool]] = {
        "rowwise": fp8._try_rowwise,
        "unscaled": fp8._try_unscaled,
        "integer": int8._try_integer,
    }
    if way in trials and way != best:
        try:
            works = trials[way](CUDA)
        except RuntimeError as error:
            pytest.skip(f"{way} is not available here: {str(error).splitlines()[0]}")
        assert works, f"{way} runs on this card but its numbers are wrong"


def test_the_way_of_this_card() -> None:
    capability = torch.cuda.get_device_capability(CUDA)
    ways = fp8._device_way(CUDA), int8._device_way(CUDA)
    print(f"{torch.cuda.get_device_name(CUDA)} sm_{capability[0]}{capability[1]} {torch.__version__}: {ways}")
    if capability >= (9, 0):
        assert ways == ("rowwise", "integer")
    if capability >= (8, 9):
        assert ways[0] in ("rowwise", "unscaled")
    assert ways[1] == "integer"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", CLASSES)
def test_quantization_equals_the_cpus(form: str, dtype: torch.dtype) -> None:
    x = rows_of(301, 5120, dtype)
    q, scale = quantize_rows(x, FORMATS[form])
    q_cpu, scale_cpu = quantize_rows(x.cpu(), FORMATS[form])
    assert torch.equal(scale.cpu(), scale_cpu)
    different = int((q.cpu().view(torch.uint8) != q_cpu.view(torch.uint8)).sum())
    print(f"{form} {dtype}: {different} of {q.numel()} quantized entries differ from the CPU's")
    assert different == 0


@pytest.mark.parametrize("bias", [torch.bfloat16, torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("form", "way"), [(form, way) for form, ways in WAYS.items() for way in (*ways, None)]
)
def test_each_way_is_the_formula(
    form: str, way: str | None, dtype: torch.dtype, bias: torch.dtype | None
) -> None:
    """way None: the one that the module takes by itself."""
    if way == "rowwise" and dtype != torch.bfloat16:
        pytest.skip("rowwise writes bf16 only; the module takes unscaled for other dtypes")
    if way is not None:
        skip_without(form, way)
    worst = 0.0
    for into, out in SIZES:
        linear = make(form, into, out, bias)
        for count in ROWS:
            x = rows_of(count, into, dtype)
            if way is None:
                y = linear(x)
            else:
                with forced_way(way):
                    y = linear(x)
            assert y.dtype == dtype and y.shape == (count, out)
            worst = max(worst, distance(y, formula(linear, x)))
    print(f"{form} {way or 'own choice'} {dtype} bias {bias}: max diff {worst:.2f} roundings")
    # One rounding is half a unit, that of an fp32 bias to bf16 may be another half; the rest is the sum.
    accumulated = ACCUMULATION[form] / torch.finfo(dtype).eps
    assert worst < (1.0 if dtype != torch.float32 else 3.0) + accumulated


@pytest.mark.parametrize("fast", [False, True])
def test_fast_accumulation(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `use_fast_accum` would cost; it is off."""
    skip_without("fp8", "unscaled")
    monkeypatch.setattr(fp8, "FAST_ACCUMULATION", fast)
    linear = make("fp8", 13824, 5120, None)
    x = rows_of(512, 13824, torch.float32)
    with forced_way("unscaled"):
        y = linear(x)
    expected = formula(linear, x)
    error = float((y.double() - expected).norm() / expected.norm())
    print(f"fp8 accumulation, fast={fast}: relative RMS difference {error:.2e}")
    assert error < (0.01 if fast else 1e-3)


@pytest.mark.parametrize("form", CLASSES)
def test_dequantized_way(form: str) -> None:
    linear = make(form, 5120, 640, torch.float32)
    x = rows_of(257, 5120, torch.bfloat16)
    with forced_way("dequantized"):
        y = linear(x)
    w = dequantize(linear.weight, linear.weight_scale).double()
    assert linear.bias is not None
    expected = x.double() @ w.t() + linear.bias.double()
    error = float((y.double() - expected).norm() / expected.norm())
    print(f"{form} dequantized: relative RMS difference {error:.2e}")
    assert error < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("form", CLASSES)
def test_odd_sizes_take_the_dequantized_way(form: str) -> None:
    linear = make(form, 36, 20, torch.bfloat16)
    x = rows_of(9, 36, torch.bfloat16)
    with forced_way("dequantized"):
        expected = linear(x)
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("form", CLASSES)
def test_layout_and_slices_do_not_matter(form: str) -> None:
    linear = make(form, 256, 768, torch.bfloat16)
    x = rows_of(2048, 256, torch.bfloat16)
    whole = linear(x)
    assert torch.equal(linear(x.t().contiguous().t()), whole)
    assert torch.equal(linear(x.view(2, 4, 256, 256)).view(2048, 768), whole)


@pytest.mark.parametrize("form", CLASSES)
def test_memory_and_time(form: str) -> None:
    """One feed-forward matrix of the 14B at 480x832x81: time of each way, and the peak beside x and y."""
    linear = make(form, 5120, 13824, torch.bfloat16)
    x = torch.randn(32760, 5120, device=CUDA).bfloat16()
    for way in (*WAYS[form][:-1], "dequantized"):
        skip_without(form, way)
        with forced_way(way):
            y = linear(x)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(5):
                y = linear(x)
            end.record()
            torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        print(f"{form} {way}: {start.elapsed_time(end) / 5:.2f} ms, {peak:.2f} GiB beside x and the last y")
        assert peak < 0.9 + 0.85  # the next y, and slices of at most a few times 128 MiB
        assert torch.isfinite(y[::997]).all()


@pytest.mark.parametrize("form", CLASSES)
@pytest.mark.parametrize("rows", [512, 1000])
def test_a_product_writes_where_it_is_told(form: str, rows: int) -> None:
    linear = make(form, 5120, 1536, torch.float32)
    x = rows_of(rows, 5120, torch.bfloat16)
    if linear.takes(x) is None:
        pytest.skip("rows are not taken prepared here")
    prepared = Prepared(*row_quantize(x, linear.form.dtype), x.dtype)
    room = torch.full((3 * rows, 1536), 7.0, dtype=torch.bfloat16, device=CUDA)
    there = linear(prepared, room[rows : 2 * rows])
    assert there.data_ptr() == room[rows].data_ptr() and torch.equal(there, linear(prepared))
    assert bool((room[:rows] == 7).all() and (room[2 * rows :] == 7).all())
