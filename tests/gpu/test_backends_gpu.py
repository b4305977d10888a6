"""Attention backends on the card: odd lengths, poisoned memory behind the last key, the same bits twice.

pytest -m gpu tests/gpu/test_backends_gpu.py -s

And our FP8 attention for Hopper, and the passes around it and cuDNN's, against their twins. Prints the
distances that it asserts.
"""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.kernels import attention_quantize as passes
from runtime.kernels import channel_spread, launch
from runtime.kernels.attention_in_columns import attend_torch
from runtime.kernels.launch import E4M3
from runtime.layers import backends, cudnn_fp8, hopper_fp8
from tests.kernel_cases import compare, poison, roundings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]

CUDA = torch.device("cuda", 0)
SCALE = 128**-0.5
LENGTHS = (64, 65, 127, 513, 1000, 2047, 4097)


def proven(name: str) -> backends.Run:
    """The backend, or a skip; what proves to be wrong here is not used either."""
    proof = backends.prove(name, CUDA)
    if not proof.ok:
        pytest.skip(f"{name}: {proof.reason}")
    return backends.named(name, CUDA)


def hard(length: int, keys: int, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of `backends.inputs` (NaN behind the last row), with outlier channels and a large mean in k."""
    q, k, v = backends.inputs(length, keys, heads, 128, torch.bfloat16, CUDA)
    g = torch.Generator(CUDA).manual_seed(keys)
    k += 4 * torch.randn(heads, 128, device=CUDA, generator=g).bfloat16()
    for x in (q, k):
        x[..., 5] *= 6
        x[..., 77] *= 6
    return q, k, v


def distance(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", [name for name in backends.BACKENDS if name != "sdpa-math"])
def test_odd_lengths_on_hard_inputs_and_the_same_bits_twice(name: str) -> None:
    run = proven(name)
    worst = 0.0
    for length in LENGTHS:
        for keys in {length, 513}:
            q, k, v = hard(length, keys)
            exact = backends.math(q.float(), k.float(), v.float(), SCALE)
            out, again = run(q, k, v, SCALE), run(q, k, v, SCALE)
            off = distance(out, exact)
            assert torch.equal(out, again), f"{length} on {keys}: two runs differ"
            worst = max(worst, off)
    print(f"{name}: {worst:.4f} from fp32 at worst")
    # on these inputs eight bits without smoothing reach .15, sixteen bits .002
    assert worst < backends.BOUNDS[backends.BACKENDS[name].bits]


IN_E4M3 = ("hopper-fp8", "cudnn-fp8")


@pytest.mark.parametrize("name", IN_E4M3)
def test_nothing_behind_the_last_key_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN, instead of zeros, behind the 8-bit copies, and in every new tensor."""
    run = proven(name)
    q, k, v = hard(1000, 1000)
    exact = backends.math(q.float(), k.float(), v.float(), SCALE)
    zeros_behind = run(q, k, v, SCALE)
    with monkeypatch.context() as patch:
        poison(patch)
        assert torch.equal(run(q, k, v, SCALE), zeros_behind)
    make = passes.to_eight_bits

    def nan_behind(x: Tensor, center: Tensor, factor: Tensor, rotate: bool) -> Tensor:
        made = make(x, center, factor, rotate)
        row = made[0, 0].numel()
        rows = made.shape[0] * made.shape[1]
        whole = torch.as_strided(made, (-(-rows // 128) * 128, row), (row, 1))
        whole[rows:].view(torch.uint8).fill_(0x7F)
        return made

    monkeypatch.setattr(passes, "to_eight_bits", nan_behind)
    out = run(q, k, v, SCALE)
    print(f"{name}: zeros behind {distance(zeros_behind, exact):.4f}, NaN behind {distance(out, exact):.4f}")
    assert distance(zeros_behind, exact) < 0.045
    if name == "hopper-fp8":  # its loads end at the last row; values in columns end in zeros, which it needs
        assert torch.equal(out, zeros_behind)


@pytest.mark.parametrize("name", IN_E4M3)
def test_it_runs_in_order_on_any_stream(name: str) -> None:
    """Behind queued work, on the default stream and on another: the numbers of an idle card."""
    run = proven(name)
    q, k, v = hard(4097, 4097)
    expected = run(q, k, v, SCALE)
    busy = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for stream in (torch.cuda.default_stream(CUDA), torch.cuda.Stream(CUDA)):
        with torch.cuda.stream(stream):
            late = torch.zeros_like(q)
            for _ in range(20):
                busy @ busy
            late.copy_(q)
            out = run(late, k, v, SCALE)
        torch.cuda.synchronize()
        assert torch.equal(out, expected), stream


@pytest.mark.parametrize("name", IN_E4M3)
def test_it_waits_for_nothing(name: str) -> None:
    """Once its graph or kernel is built, a call returns while the card is still at earlier work."""
    run = proven(name)
    q, k, v = hard(2047, 2047)
    run(q, k, v, SCALE)
    torch.cuda.synchronize()
    with_errors = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(q, k, v, SCALE)
    finally:
        torch.cuda.set_sync_debug_mode(with_errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_passes_are_their_twins(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if launch.capability(CUDA) < launch.LOWEST[E4M3]:
        pytest.skip("this card has no e4m3")
    assert launch.trouble(CUDA) is None, launch.trouble(CUDA)
    poison(monkeypatch)
    for length, heads in ((1, 3), (63, 3), (65, 40), (1000, 40), (4097, 5)):
        for x in (each.to(dtype) for each in hard(length, length, heads)):
            got, expected = channel_spread.spread(x), channel_spread.spread_torch(x)
            assert torch.equal(got.low, expected.low) and torch.equal(got.high, expected.high)
            off = float((got.mean - expected.mean).abs().max() / expected.high.abs().max())
            assert off < 1e-4
            reach = torch.maximum(got.high - got.mean, got.mean - got.low).clamp_min(1.0)
            for rotate in (True, False):
                bound = reach.square().sum(1, keepdim=True).sqrt().expand_as(reach) if rotate else reach
                ours = passes.to_eight_bits(x, got.mean, 448 / bound, rotate)
                with launch.twins():
                    theirs = passes.to_eight_bits(x, got.mean, 448 / bound, rotate)
                one = torch.ones(1, device=CUDA)
                name = f"to_eight_bits {length}x{heads} {dtype} rotated {rotate}"
                compare(name, (ours, one), (theirs, one), rate=5e-3)
            back = passes.restore(ours, got.high, got.mean, dtype)
            worst = roundings(back, passes.restore_torch(ours, got.high, got.mean, dtype))
            print(f"restore {length}x{heads} {dtype}: {worst:.2f} roundings; means differ by {off:.1e}")
            assert worst <= 1.0


def test_the_last_of_more_than_two_billion_entries() -> None:
    """Places behind 2^31 entries, which 32 bits cannot count."""
    if torch.cuda.mem_get_info(CUDA)[0] < 20 * 2**30 or launch.capability(CUDA) < launch.LOWEST[E4M3]:
        pytest.skip("needs 20 GiB and e4m3")
    rows = 2**31 // 5120 + 200
    x = torch.zeros(1, rows, 40, 128, dtype=torch.bfloat16, device=CUDA)
    x[:, -9:] = hard(9, 9, 40)[1]
    ones = torch.ones(40, 128, device=CUDA)
    got = passes.to_eight_bits(x, 0 * ones, ones, rotate=True)[:, -9:]
    with launch.twins():
        expected = passes.to_eight_bits(x[:, -9:], 0 * ones, ones, rotate=True)
    one = torch.ones(1, device=CUDA)
    compare("to_eight_bits, last rows", (got, one), (expected, one), rate=5e-3)
    found = channel_spread.spread(x)
    assert torch.equal(found.high, x[:, -9:].amax((0, 1)).float().clamp_min(0))
    back = passes.restore(passes.to_eight_bits(x, 0 * ones, ones, rotate=False), ones, ones, torch.bfloat16)
    assert torch.equal(back[:, -9:], (x[:, -9:].float().clamp(-448, 448).to(E4M3).float() + 1).bfloat16())


def test_heads_of_64_too() -> None:
    run = proven("cudnn-fp8")
    q, k, v = backends.inputs(513, 513, 3, 64, torch.bfloat16, CUDA)
    off = distance(run(q, k, v, 64**-0.5), backends.math(q.float(), k.float(), v.float(), 64**-0.5))
    print(f"heads of 64: {off:.4f} from fp32; output {cudnn_fp8._graph.cache_info()}")
    assert off < backends.BOUNDS[8]


# --- our kernel for Hopper ---


@pytest.fixture
def hopper() -> Any:
    """The module of the kernel, or a skip."""
    if hopper_fp8.find(launch.capability(CUDA)) is None:
        pytest.skip("for Hopper alone, with Triton 3.6 or later")
    assert launch.trouble(CUDA) is None, launch.trouble(CUDA)
    return importlib.import_module("runtime.kernels.hopper_attention")


ODD = (64, 65, 191, 193, 1000, 4097)


def kernel_and_twin(hopper: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel wrote into memory full of other numbers, and what its twin computes; (L, H, 128)."""
    given = passes.quantize_by_sample(q, k, v)
    arguments = (given.q[0], given.k[0], given.v, given.descale, given.factor, given.center, SCALE)
    out = torch.full(q.shape[1:], -6e4, dtype=q.dtype, device=CUDA)
    assert hopper.attend(*arguments, out) is out
    again = hopper.attend(*arguments, torch.zeros_like(out))
    assert torch.equal(out, again), "two runs differ"
    return out, attend_torch(*arguments)


@pytest.mark.parametrize("keys", ODD)
def test_the_kernel_is_its_twin(hopper: Any, keys: int) -> None:
    """Weights are rounded in units of the largest score so far, there of all: .005 apart on a CPU."""
    for length in ODD:
        q, k, v = hard(length, keys, heads=3)
        out, expected = kernel_and_twin(hopper, q, k, v)
        off = distance(out, expected)
        print(f"{length} on {keys} keys: {off:.4f} from the twin")
        assert off < 0.01


def test_the_kernel_is_its_twin_in_fp16_and_with_forty_heads(hopper: Any) -> None:
    for dtype, heads in ((torch.float16, 2), (torch.bfloat16, 40)):
        q, k, v = (x.to(dtype) for x in hard(1000, 1000, heads))
        off = distance(*kernel_and_twin(hopper, q, k, v))
        print(f"{dtype}, {heads} heads: {off:.4f} from the twin")
        assert off < 0.01


def test_sums_of_a_videos_keys_lose_nothing(hopper: Any) -> None:
    """Where all keys pull one way: .0022 from fp32 on a CPU, most of it the result's own rounding."""
    q, k, v = backends.one_sided(1000, 32760, 3, 128, torch.bfloat16, CUDA)
    exact = backends.math(q.float(), k.float(), v.float(), SCALE)
    off = distance(hopper_fp8.run(q, k, v, SCALE), exact)
    cudnn = cudnn_fp8.find(launch.capability(CUDA))
    theirs = "is missing" if cudnn is None else f"loses {distance(cudnn(q, k, v, SCALE), exact):.3f}"
    print(f"hopper-fp8: {off:.4f} from fp32; cudnn-fp8 {theirs}")
    assert off < 0.01


def test_the_result_takes_the_memory_of_the_queries(hopper: Any) -> None:
    q, k, v = (torch.cat([x, 2 * x.flip(1)]) for x in hard(1000, 1000))
    expected, kept = hopper_fp8.run(q, k, v, SCALE), (k.clone(), v.clone())
    out = hopper_fp8.run_over(q, k, v, SCALE)
    assert out.data_ptr() == q.data_ptr() and torch.equal(out, expected)
    assert torch.equal(k, kept[0]) and torch.equal(v, kept[1])


def test_rows_far_beyond_the_sample_saturate(hopper: Any) -> None:
    """They are the largest number to the kernels as to the twins, and spoil no other row."""
    length = passes._EVERY * passes._ENOUGH + 9
    q, k, v = hard(length, length, heads=2)
    for x in (q, k, v):
        x[0, 5] *= 1e5  # of a row that is not looked at
    given = passes.quantize_by_sample(q, k, v)
    with launch.twins():
        twins = passes.quantize_by_sample(q, k, v)
    one = torch.ones(1, device=CUDA)
    for name in ("q", "k", "v"):
        ours, theirs = getattr(given, name), getattr(twins, name)
        assert ours.float().isfinite().all() and float(ours.float().abs().max()) == 448
        compare(f"{name} with a row that saturates", (ours, one), (theirs, one), rate=5e-3)
    out = hopper_fp8.run(q, k, v, SCALE)
    assert out.isfinite().all()
    arguments = (given.k[0], given.v, given.descale, given.factor, given.center, SCALE)
    off = distance(out[0, :200], attend_torch(given.q[0, :200], *arguments))
    print(f"with rows that saturate: {off:.4f} from the twin")
    assert off < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_in_columns_are_the_twins_bit_for_bit(
    hopper: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    for length, heads in ((1, 3), (64, 3), (191, 40), (1000, 5), (4097, 2)):
        x = hard(length, length, heads)[2].to(dtype)
        x[0, -1, 0, 3] = float("nan")
        center, reach = x[:, :1].float()[0, 0], torch.rand(heads, 128, device=CUDA) + 0.5
        got = passes.to_columns(x, center, 448 / reach)
        with launch.twins():
            expected = passes.to_columns(x, center, 448 / reach)
        nan = got.float().isnan()
        assert torch.equal(nan, expected.float().isnan()) and int(nan.sum()) in (1, length)
        ours, theirs = (one.view(torch.uint8).masked_fill(nan, 0) for one in (got, expected))
        print(f"{length}x{heads} {dtype}: {int((ours != theirs).sum())} of {ours.numel()} differ")
        assert torch.equal(ours, theirs)
