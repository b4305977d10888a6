"""The passes round eight-bit attention against their twins in Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 python -m pytest tests/unit/attention_quantize_in_interpreter.py -s

`test_cudnn_fp8.py` starts this: the interpreter must be asked for before Triton is imported.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the interpreter is a part of Triton")

import triton.language as tl
from triton.runtime import interpreter

from runtime.kernels import attention_quantize as passes
from runtime.kernels import launch
from runtime.kernels.channel_spread import spread_torch, spread_triton
from runtime.kernels.launch import E4M3
from runtime.kernels.rms_rope import rms_rope_triton
from runtime.kernels.rms_rope_quantize import rms_rope_quantize_torch, rms_rope_quantize_triton
from tests.kernel_cases import NORMED_HEADS, compare, levels, normed_heads, poison, roundings
from tests.unit.kernels_in_interpreter import _conversions_round_to_nearest  # noqa: F401

assert launch.INTERPRETED, "set TRITON_INTERPRET=1"

SHAPES = [(1, 65, 2, 128), (1, 1, 1, 64), (2, 70, 2, 64), (1, 1100, 1, 16)]  # the last: several programs
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def _products_read_bf16() -> Iterator[None]:
    """The interpreter multiplies the bits of bf16 as if they were integers: here, the numbers."""
    builder = interpreter.InterpreterBuilder
    theirs = builder.create_dot

    def create_dot(self: object, a: object, b: object, d: object, *rest: object) -> object:
        if a.dtype.scalar != tl.bfloat16:
            return theirs(self, a, b, d, *rest)
        one, other = ((x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
        return interpreter.TensorHandle(np.matmul(one, other) + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
    yield
    builder.create_dot = theirs


def hard(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows with a large common mean and an outlier channel, among NaN, with room between rows."""
    batch, length, heads, head_dim = shape
    g = torch.Generator().manual_seed(seed + length)
    room = torch.full((batch, length + 70, heads + 2, head_dim), float("nan"), dtype=dtype)
    x = torch.randn(shape, generator=g) + 5 * torch.randn(heads, head_dim, generator=g)
    x[..., 3] *= 20
    if batch > 1:  # rows of several batches nest only when nothing lies between them
        return x.to(dtype)
    room[:, :length, 1:-1] = x.to(dtype)
    return room[:, :length, 1:-1]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spread(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = hard(shape, dtype)
    expected = spread_torch(x)
    poison(monkeypatch)
    got = spread_triton(x)
    difference = float(((got.mean - expected.mean).abs() / expected.high.abs()).max())
    print(f"spread {shape} {dtype}: largest difference of the mean {difference:.1e}")
    assert torch.equal(got.low, expected.low) and torch.equal(got.high, expected.high)
    assert difference < 1e-5


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_eight_bits(
    shape: tuple[int, ...], dtype: torch.dtype, rotate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = hard(shape, dtype)
    found = spread_torch(x)
    center = passes.rotated(found.mean) if rotate else found.mean
    reach = torch.maximum(found.high - found.mean, found.mean - found.low).clamp_min(1e-3)
    factor = 448 / reach.square().sum(1, keepdim=True).sqrt().expand_as(reach)
    factor = (factor * shape[-1] ** -0.5 if rotate else 448 / reach).contiguous()
    expected = passes.to_eight_bits_torch(x, center, factor, rotate)
    poison(monkeypatch)
    got = passes.to_eight_bits_triton(x, center, factor, rotate)
    ones = torch.ones(1)
    # sums of 128 numbers in another order: now and then one that lies between two 8-bit neighbours
    compare(f"to_eight_bits {shape} {dtype} rotated {rotate}", (got, ones), (expected, ones), rate=2e-3)
    rows = shape[0] * shape[1]
    for made in (got, expected):
        whole = torch.as_strided(made, (-(-rows // 128) * 128, made[0, 0].numel()), (made[0, 0].numel(), 1))
        assert not whole[rows:].float().any() and whole[rows:].float().isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1, 65, 2, 128), (1, 1, 1, 64), (1, 129, 2, 64), (1, 600, 1, 16)], ids=str)
def test_to_columns(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = hard(shape, dtype)
    found = spread_torch(x)
    factor = 448 / torch.maximum(found.high - found.mean, found.mean - found.low).clamp_min(1e-3)
    expected = passes.to_columns_torch(x, found.mean, 2 * factor)  # half of the range is beyond e4m3
    with monkeypatch.context() as patch:
        poison(patch)
        got = passes.to_columns_triton(x, found.mean, 2 * factor)
    print(f"to_columns {shape} {dtype}: {int((expected.float().abs() == 448).sum())} saturated")
    assert got.shape == expected.shape == (shape[2] * shape[3], -(-shape[1] // 128) * 128)
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    behind = passes.slots(got.shape[1], x.device) >= shape[1]
    assert not got.view(torch.uint8)[:, behind].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_does_not_become_a_good_one(bad: float) -> None:
    for rotate in (True, False):
        x = hard((1, 70, 2, 64), torch.bfloat16)
        x[0, 69, 1, 5] = bad
        found = spread_triton(x)
        assert found.mean[0].isfinite().all() and not found.mean[1, 5].isfinite()
        ones = torch.ones_like(found.mean)
        q8 = passes.to_eight_bits_triton(x, found.mean * 0, ones / found.high.abs().amax(1)[:, None], rotate)
        assert q8[0, :, 0].float().isfinite().all()
        assert q8[0, 69, 1].float().isnan().any()


def test_nan_stays_nan_in_its_column_alone() -> None:
    x = hard((1, 130, 2, 64), torch.bfloat16)
    ones = torch.ones(2, 64)
    x[0, 129, 1, 5] = float("nan")
    order = passes.slots(256, x.device).tolist()
    for run in (passes.to_columns_triton, passes.to_columns_torch):
        bad = run(x, 0 * ones, ones).float().isnan()
        assert bad.nonzero().tolist() == [[64 + 5, order.index(129)]]


@pytest.mark.parametrize("wanted", HALVES, ids=str)
@pytest.mark.parametrize("given", [E4M3, torch.bfloat16], ids=str)
def test_restore(given: torch.dtype, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in (*SHAPES, (1, 9, 7, 128)):
        g = torch.Generator().manual_seed(shape[1])
        out = (100 * torch.randn(shape, generator=g)).clamp(-448, 448).to(given)
        factor, center = torch.rand(shape[2:], generator=g), torch.randn(shape[2:], generator=g)
        expected = passes.restore_torch(out.clone(), factor, center, wanted)
        with monkeypatch.context() as patch:
            poison(patch)
            got = passes.restore_triton(out, factor, center, wanted)
        worst = roundings(got, expected)
        print(f"restore {shape} {given} to {wanted}: {worst:.2f} roundings")
        assert got.dtype == wanted and got.shape == shape and (got is out) == (given == wanted)
        assert worst <= 1.0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("heads", NORMED_HEADS, ids=str)
def test_rms_rope_quantize(
    heads: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rope, center in ((True, True), (True, False), (False, False)):
        given = normed_heads((2, 3), *heads, dtype, rope, center)
        expected = rms_rope_quantize_torch(*given.arguments)
        n = rms_rope_triton(given.x.clone(), given.weight, given.eps, heads[1], given.table)
        middle = torch.zeros(heads) if given.center is None else given.center
        factor = given.factor[:, None].expand(heads)
        in_two = passes.to_eight_bits_torch(n.unflatten(-1, heads), middle, factor, True).reshape(n.shape)
        before = given.x.clone()
        with monkeypatch.context() as patch:
            poison(patch)
            got = rms_rope_quantize_triton(*given.arguments)
        assert torch.equal(given.x, before) and not got.float().isnan().any()
        for name, other in (("its twin", expected), ("two passes", in_two)):
            off = (levels(got) - levels(other)).abs()
            print(f"{heads} {dtype} and {name}: {int((off > 0).sum())} of {off.numel()} differ")
            # sums in another order: now and then a number that lies between two of 16 or of 8 bits
            assert int(off.max()) <= 1 and float((off > 0).float().mean()) <= 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_is_nan_in_its_head_as_in_the_twin(bad: float) -> None:
    for place in (70, 639):
        given = normed_heads((1, 2), 5, 128, torch.bfloat16, rope=True, center=True)
        given.factor[3] = 3e38  # beyond the largest number of fp32 after the product
        given.x[0, 1, place] = bad
        got, expected = rms_rope_quantize_triton(*given.arguments), rms_rope_quantize_torch(*given.arguments)
        head = place // 128
        assert got[0, 1].float().unflatten(-1, (5, 128))[head].isnan().all()
        assert torch.equal(got.float().isnan(), expected.float().isnan())
        assert got[0, :, 3 * 128 : 4 * 128].float().isnan().any()
        assert int((levels(got) - levels(expected)).abs()[expected.float().isfinite()].max()) <= 1
