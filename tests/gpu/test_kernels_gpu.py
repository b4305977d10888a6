"""Every kernel on the card against its twin, at real widths and odd lengths; prints the largest differences.

pytest -m gpu tests/gpu/test_kernels_gpu.py -s

Outputs are poisoned before each run, so an entry that a kernel does not write is seen.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from runtime.kernels import configs, launch, tune, w8a8
from runtime.kernels.attention_quantize import to_eight_bits_triton
from runtime.kernels.gated_add import gated_add, gated_add_torch
from runtime.kernels.gelu_quantize import gelu_quantize, gelu_quantize_torch
from runtime.kernels.launch import E4M3
from runtime.kernels.norm_quantize import (
    ROWS,
    Residual,
    norm,
    norm_quantize,
    norm_quantize_torch,
    norm_quantize_triton,
    norm_torch,
)
from runtime.kernels.norm_silu import norm_silu, norm_silu_torch
from runtime.kernels.rms_rope import rms_rope, rms_rope_torch
from runtime.kernels.rms_rope_quantize import rms_rope_quantize_torch, rms_rope_quantize_triton
from runtime.kernels.row_quantize import row_quantize, row_quantize_torch
from runtime.layers import backends
from tests import kernel_cases
from tests.kernel_cases import (
    DTYPES,
    FORMATS,
    NORMED_HEADS,
    SCALINGS,
    compare,
    levels,
    normed_heads,
    poison,
    roundings,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]

CUDA = torch.device("cuda", 0)
SHAPES = [(1, 5120), (7, 5120), (1001, 5120), (257, 1536), (63, 8960), (129, 13824), (33, 1000), (5, 17)]
PRODUCTS = [(1, 48, 80), (300, 272, 1536), (1001, 1536, 5120), (513, 5120, 13824)]  # (M, N, K)


@pytest.fixture(autouse=True)
def _kernels_work_and_outputs_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert launch.trouble(CUDA) is None, launch.trouble(CUDA)
    poison(monkeypatch)
    yield
    torch.cuda.synchronize()


def skip_without(form: torch.dtype) -> None:
    if launch.capability(CUDA) < launch.LOWEST[form]:
        pytest.skip(f"this card has no {form}")


def tokens(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return kernel_cases.tokens(count, width, dtype, seed, "cuda")


def vector(width: int, seed: int) -> Tensor:
    return kernel_cases.vector(width, seed, "cuda")


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_quantize_is_its_twin_bit_for_bit(form: torch.dtype, dtype: torch.dtype) -> None:
    skip_without(form)
    for count, width in SHAPES:
        x = tokens(count, width, dtype)
        got, expected = row_quantize(x, form), row_quantize_torch(x, form)
        compare(f"row_quantize {count}x{width} {dtype} {form}", got, expected, rate=0.0)


@pytest.mark.parametrize("residual", ["none", "gated", "plain"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_quantize(residual: str, scaling: str, dtype: torch.dtype) -> None:
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for count, width in SHAPES:
        x = tokens(count, width, dtype)
        before = None
        if residual != "none":
            gate = vector(width, 5) if residual == "gated" else None
            before = Residual(tokens(count, width, dtype, 9), gate)
        how = SCALINGS[scaling](width, "cuda")
        name = f"{scaling} {residual} {count}x{width} {dtype}"
        for form in FORMATS:
            if launch.capability(CUDA) < launch.LOWEST[form]:
                continue
            ours, theirs = x.clone(), x.clone()
            got = norm_quantize(ours, how, 1e-6, form, before)
            expected = norm_quantize_torch(theirs, how, 1e-6, form, before)
            assert torch.equal(ours, theirs), f"{name}: the residual stream differs"
            compare(f"norm_quantize {name} {form}", got, expected, 0.02, eps)
            in_turn = norm_quantize_triton(x.clone(), how, 1e-6, form, before, rows=ROWS)
            for one, other in zip(got, in_turn, strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (
                    f"{name}: rows in turn differ"
                )
        ours, theirs = x.clone(), x.clone()
        worst = roundings(norm(ours, how, 1e-6, before), norm_torch(theirs, how, 1e-6, before))
        print(f"norm {name}: largest difference {worst:.2f} roundings")
        assert torch.equal(ours, theirs)
        assert worst <= (1.0 if dtype != torch.float32 else 100.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_rope(dtype: torch.dtype) -> None:
    for batch, length, heads, head_dim in ((1, 999, 40, 128), (2, 33, 12, 128), (1, 7, 3, 64), (3, 5, 1, 16)):
        width = heads * head_dim
        angles = vector(length * head_dim // 2, 3).mul(9).view(length, 1, head_dim // 2)
        for table in ((angles.cos(), angles.sin()), None):
            x = tokens(batch * length, width, dtype).view(batch, length, width)
            expected = rms_rope_torch(x.clone(), vector(width, 1), 1e-6, head_dim, table)
            got = rms_rope(x, vector(width, 1), 1e-6, head_dim, table)
            worst = roundings(got, expected)
            print(f"rms_rope {batch}x{length}x{heads}x{head_dim} {dtype}: {worst:.2f} roundings")
            assert got is x and worst <= (1.0 if dtype != torch.float32 else 20.0)


@pytest.mark.parametrize(("rope", "center"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rms_rope_quantize(dtype: torch.dtype, rope: bool, center: bool) -> None:
    """Against its twin, and against the two passes that it replaces; the same bytes twice.

    Sums of a row in another order round some of its numbers to the next one of 16 bits, and the rotation
    gives each such step to its whole head: two of them, and a step of e4m3, are allowed.
    """
    skip_without(E4M3)
    for heads in NORMED_HEADS:
        given = normed_heads((2, 1003 if heads == (40, 128) else 61), *heads, dtype, rope, center, "cuda")
        got = rms_rope_quantize_triton(*given.arguments)
        again = rms_rope_quantize_triton(*given.arguments)
        assert torch.equal(got.view(torch.uint8), again.view(torch.uint8))
        n = rms_rope(given.x.clone(), given.weight, given.eps, heads[1], given.table).unflatten(-1, heads)
        middle = torch.zeros(heads, device=CUDA) if given.center is None else given.center
        factor = given.factor[:, None].expand(heads).contiguous()
        in_two = to_eight_bits_triton(n, middle, factor, True).reshape(got.shape)
        rounding = 2 * torch.finfo(dtype).eps * n.float().abs().amax(-1, keepdim=True)  # (2, L, H, 1)
        mine = got.float().unflatten(-1, heads)
        for name, twin in (("its twin", rms_rope_quantize_torch(*given.arguments)), ("two passes", in_two)):
            other = twin.float().unflatten(-1, heads)
            allowed = rounding * factor[:, :1] + torch.maximum(mine.abs(), other.abs()) / 8 + 2**-9
            off = (mine - other).abs()
            share, worst = float((off > 0).float().mean()), float((off / allowed).max())
            print(f"{heads} {dtype} and {name}: {share:.1e} differ, by {worst:.2f} of what may be")
            assert worst <= 1 and share <= 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_before_attention_is_nan_in_its_head(bad: float) -> None:
    skip_without(E4M3)
    for place in (0, 3000, 5119):
        given = normed_heads((1, 33), 40, 128, torch.bfloat16, True, True, "cuda")
        good = rms_rope_quantize_triton(*given.arguments)
        given.factor[7] = 3e38  # beyond the largest number of fp32 after the product
        given.x[0, 20, place] = bad
        got, expected = rms_rope_quantize_triton(*given.arguments), rms_rope_quantize_torch(*given.arguments)
        nan, heads = got.float().isnan(), got.unflatten(-1, (40, 128))
        assert heads[0, 20, place // 128].float().isnan().all() and torch.equal(nan, expected.float().isnan())
        rest = [row for row in range(33) if row != 20]
        same = (levels(heads) == levels(good.unflatten(-1, (40, 128))))[:, rest]
        assert (
            nan.unflatten(-1, (40, 128))[:, rest, 7].any() and same[:, :, :7].all() and same[:, :, 8:].all()
        )


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_quantize(form: torch.dtype, dtype: torch.dtype) -> None:
    skip_without(form)
    for count, width in SHAPES:
        h = tokens(count, width, dtype)
        eps = max(torch.finfo(dtype).eps, 1e-6)
        for factor in (None, torch.randn(h.shape, device=CUDA).to(dtype)):
            got, expected = gelu_quantize(h, form, factor), gelu_quantize_torch(h, form, factor)
            name = f"gelu_quantize {count}x{width} {dtype} {form}, factor {factor is not None}"
            compare(name, got, expected, 0.02, eps if factor is None else 2 * eps)  # it is rounded twice


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_add_is_its_twin_bit_for_bit(dtype: torch.dtype) -> None:
    for count, width in SHAPES:
        x, branch, gate = tokens(count, width, dtype), tokens(count, width, dtype, 1), vector(width, 2)
        expected = gated_add_torch(x.clone(), branch, gate)
        assert torch.equal(gated_add(x, branch, gate), expected)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_silu(dtype: torch.dtype, silu: bool) -> None:
    for channels, size in ((96, (4, 61, 83)), (192, (60, 104)), (384, (15, 26)), (33, (40,)), (4, (1, 1))):
        g = torch.Generator(CUDA).manual_seed(channels)
        x = torch.randn(2, channels, *size, generator=g, device=CUDA).mul(3).to(dtype)
        x[:, :, 0] = 0
        gamma = vector(channels, 1)
        expected = norm_silu_torch(x, gamma, silu)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        wider = torch.full((2, *size, 3 * channels), float("nan"), dtype=dtype, device=CUDA).movedim(-1, 1)
        among = wider[:, channels : 2 * channels]
        for name, given, out in (("first", x, None), ("last", last, None), ("view", last, among), ("", x, x)):
            got = norm_silu(given, gamma, silu, out)
            worst = roundings(got.movedim(1, -1), expected.movedim(1, -1))
            print(f"norm_silu {channels} {size} {dtype} silu {silu} {name}: {worst:.2f} roundings")
            assert worst <= (1.0 if dtype != torch.float32 else 20.0)
        assert wider[:, :channels].isnan().all() and wider[:, 2 * channels :].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_bad_row_stays_bad_and_spoils_no_other(form: torch.dtype, bad: float) -> None:
    skip_without(form)
    for place in (0, 4095, 4096, 5119):
        x = tokens(6, 5120, torch.bfloat16)
        x[5, place] = bad
        scaling = SCALINGS["modulated"](5120, "cuda")
        for q, scale in (
            row_quantize(x, form),
            norm_quantize(x, scaling, 1e-6, form),
            norm_quantize(x, SCALINGS["rms"](5120, "cuda"), 1e-6, form),
            gelu_quantize(x.abs(), form),
            gelu_quantize(torch.ones_like(x), form, x),
        ):
            back = q.float() * scale
            assert back[5].isnan().all() and back[:5].isfinite().all()
        weight = tune._random((64, 5120), form, torch.Generator(CUDA).manual_seed(0))
        q, scale = row_quantize(x, form)
        y = w8a8.w8a8(q, weight, scale, torch.ones(64, 1, device=CUDA))
        assert y[5].isnan().all() and y[:5].isfinite().all()


def operands(rows: int, columns: int, depth: int, form: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator(CUDA).manual_seed(seed)
    q, w = (tune._random(shape, form, g) for shape in ((rows, depth), (columns, depth)))
    s_a, s_w = (torch.rand(n, 1, device=CUDA, generator=g).mul(2).mul_(depth**-0.5) for n in (rows, columns))
    return q, w, s_a, s_w, torch.randn(columns, device=CUDA, generator=g)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_config_of_the_product(form: torch.dtype) -> None:
    """int8 equals the twin bit for bit, e4m3 within what the card's sums lose; odd depths too."""
    skip_without(form)
    cases = [(operands(*shape, form, seed), shape) for seed, shape in enumerate(PRODUCTS)]
    checked = 0
    for config in configs.candidates(launch.capability(CUDA), form, launch.HAS_DESCRIPTORS):
        for given, shape in cases:
            expected = w8a8.w8a8_torch(*given, torch.float32)
            for fast in (False, True) if form == E4M3 else (False,):
                try:
                    got = w8a8.w8a8_triton(*given, torch.float32, False, fast, config)
                except Exception as error:  # noqa: BLE001  (no room on this card: the tuner leaves it out too)
                    print(f"{config} {form}: {type(error).__name__} {str(error).splitlines()[:1]}")
                    continue
                difference = float((got.double() - expected.double()).norm() / expected.double().norm())
                print(f"{config} {form} {shape} fast {fast}: relative difference {difference:.1e}")
                if form == torch.int8:
                    assert torch.equal(got, expected)
                assert difference < (6e-3 if fast else 1e-3)
                checked += 1
    assert checked >= len(PRODUCTS)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_epilogue(form: torch.dtype, out_dtype: torch.dtype, gelu: bool) -> None:
    skip_without(form)
    for bias_dtype in (torch.float32, torch.bfloat16, None):
        q, w, s_a, s_w, bias = operands(333, 1552, 5120, form, 3)
        given = q, w, s_a, s_w, None if bias_dtype is None else bias.to(bias_dtype)
        got = w8a8.w8a8(*given, out_dtype, gelu)
        expected = w8a8.w8a8_torch(*given, out_dtype, gelu)
        worst = roundings(got, expected)
        print(f"epilogue {form} -> {out_dtype}, gelu {gelu}, bias {bias_dtype}: {worst:.2f} roundings")
        assert worst <= (1e-2 / torch.finfo(out_dtype).eps + 1 if form == E4M3 else 1.0 + 40 * gelu)


def test_offsets_beyond_two_to_the_31() -> None:
    """More entries than an int32 can count: the last rows are right."""
    rows, width = 2**31 // 13824 + 9, 13824
    x = torch.empty((rows, width), dtype=torch.bfloat16, device=CUDA)
    x[-9:] = tokens(9, width, torch.bfloat16)
    x[:-9] = x[-9:].repeat(rows // 9 + 1, 1)[: rows - 9]
    q, scale = row_quantize(x, torch.int8)
    expected, expected_scale = row_quantize_torch(x[-9:], torch.int8)
    assert torch.equal(q[-9:], expected) and torch.equal(scale[-9:], expected_scale)
    weight = tune._random((32, width), torch.int8, torch.Generator(CUDA).manual_seed(1))
    ones = torch.ones(32, 1, device=CUDA)
    y = w8a8.w8a8(q, weight, scale, ones, out_dtype=torch.float32)
    assert torch.equal(y[-9:], w8a8.w8a8_torch(expected, weight, expected_scale, ones, None, torch.float32))


def test_attention_backends_of_this_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # timing is not poisoned
    proofs = {proof.name: proof for proof in backends.proofs(CUDA, torch.bfloat16, 128)}
    for proof in proofs.values():
        print(f"{proof.name:16} {'right' if proof.ok else '-----'} {proof.distance:.4f} {proof.reason}")
    assert proofs["sdpa"].ok and proofs["sdpa-math"].ok
    assert any(proofs[name].ok for name in ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient"))
    for tokens, keys in ((8190, None), (8190, 512)):
        choice = backends.choose(CUDA, tokens, keys)
        timed = ", ".join(f"{timing.name} {timing.milliseconds:.2f}" for timing in choice.timings)
        print(f"{tokens} on {keys or tokens} keys: {backends.rungs(choice, CUDA)}; ms: {timed}")
        assert proofs[choice.name].ok and backends.rungs(choice, CUDA)[-1] == "sdpa-math"


@pytest.mark.parametrize("name", ["sage2", "sage1"])
def test_sage_on_the_default_stream_behind_queued_work_is_right(name: str) -> None:
    """And what a side stream gives, where SageAttention 2.2.0 loses order (2.0 on an H200, all finite)."""
    run = backends.available(name, CUDA)
    if run is None:
        pytest.skip(f"{name} is not installed, or not for this card")
    q, k, v = backends.inputs(8190, 8190, 8, 128, torch.bfloat16, CUDA)
    expected = backends.math(q.float(), k.float(), v.float(), 128**-0.5)
    busy = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)

    def distance() -> float:
        late = torch.zeros_like(q)
        for _ in range(20):
            busy @ busy
        late.copy_(q)
        out = run(late, k, v, 128**-0.5)
        torch.cuda.synchronize()
        return float((out.float() - expected).norm() / expected.norm())

    right = distance()
    with torch.cuda.stream(torch.cuda.Stream()):
        aside = distance()
    print(f"{name}: distance {right:.3f} on the default stream, {aside:.3f} on a side stream")
    assert right < backends.BOUNDS[8]
