"""RMSNorm, positions and eight bits in one pass: the twin against the formula in float64, and refusals."""

import pytest
import torch
from torch import Tensor

from runtime.kernels.attention_quantize import hadamard, to_eight_bits_torch
from runtime.kernels.launch import E4M3
from runtime.kernels.rms_rope import rms_rope
from runtime.kernels.rms_rope_quantize import (
    rms_rope_quantize,
    rms_rope_quantize_torch,
    rms_rope_quantize_triton,
)
from tests.kernel_cases import DTYPES, NORMED_HEADS, NormedHeads, levels, normed_heads

EPS = 1e-6


def in_double(given: NormedHeads) -> Tensor:
    """The formula of the file, number by number in float64, each rounding where the file has it."""
    x, heads = given.x.double(), given.factor.numel()
    n = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * given.weight.double()
    if given.table is not None:
        cos, sin = (part.double().flatten(1) for part in given.table)  # (L, D/2)
        angle = torch.complex(cos, sin).unsqueeze(1)
        pairs = torch.view_as_complex(n.unflatten(-1, (heads, -1, 2)))
        n = torch.view_as_real(pairs * angle).flatten(-3)
    n = n.to(given.x.dtype).double().unflatten(-1, (heads, -1))
    z = n @ hadamard(n.shape[-1], n.device).double()
    if given.center is not None:
        z = z - given.center.double()
    y = (z * given.factor.double()[:, None]).flatten(-2)
    return y.clamp(-448, 448).float().to(E4M3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rope", "center"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("heads", NORMED_HEADS, ids=str)
def test_the_twin_is_the_formula(
    heads: tuple[int, int], rope: bool, center: bool, dtype: torch.dtype
) -> None:
    given = normed_heads((2, 9), *heads, dtype, rope, center)
    got, expected = rms_rope_quantize_torch(*given.arguments), in_double(given)
    off = (levels(got) - levels(expected)).abs()
    saturated = float((got.float().abs() == 448).float().mean())
    print(f"{heads} {dtype}: {int((off > 0).sum())} of {off.numel()} differ; {saturated:.1%} saturated")
    assert got.shape == given.x.shape and got.dtype == E4M3
    # a 16-bit rounding of n that falls the other way is less than one step of eight bits
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) <= 2e-3
    assert 0 < saturated < 0.2 and levels(got).unique().numel() > 100


def test_it_is_the_two_passes_in_one() -> None:
    given = normed_heads((1, 70), 5, 64, torch.bfloat16, rope=True, center=True)
    n = rms_rope(given.x.clone(), given.weight, EPS, 64, given.table).unflatten(-1, (5, 64))
    wide = given.factor[:, None].expand(5, 64)
    assert given.center is not None
    expected = to_eight_bits_torch(n, given.center, wide, rotate=True).flatten(-2)
    got = rms_rope_quantize(*given.arguments)
    assert torch.equal(got.view(torch.uint8), expected.reshape(got.shape).view(torch.uint8))


def test_slices_of_tokens_are_the_same_bytes() -> None:
    given = normed_heads((1, 1200), 3, 32, torch.bfloat16, rope=True, center=True)
    whole = rms_rope_quantize(*given.arguments)
    assert given.table is not None
    for start, end in ((0, 511), (511, 513), (513, 1200)):
        table = given.table[0][start:end], given.table[1][start:end]
        part = given._replace(x=given.x[:, start:end].contiguous(), table=table)
        got = rms_rope_quantize(*part.arguments)
        assert torch.equal(got.view(torch.uint8), whole[:, start:end].view(torch.uint8))


def test_it_writes_where_it_is_told_and_nowhere_else() -> None:
    given = normed_heads((1, 40), 2, 64, torch.float16, rope=True, center=False)
    room = torch.full((60, 128), 7.0).to(E4M3)
    before = given.x.clone()
    got = rms_rope_quantize(*given.arguments, into=room[10:50].view(1, 40, 128))
    assert got.data_ptr() == room[10].data_ptr() and torch.equal(before, given.x)
    assert torch.equal(got.view(torch.uint8), rms_rope_quantize(*given.arguments).view(torch.uint8))
    assert (room[:10].float() == 7).all() and (room[50:].float() == 7).all()
    flat = rms_rope_quantize(*given._replace(x=given.x[0]).arguments)
    assert flat.shape == (40, 128) and torch.equal(flat.view(torch.uint8), got[0].view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_makes_its_head_nan_and_spoils_no_other_row(bad: float) -> None:
    given = normed_heads((1, 6), 3, 64, torch.bfloat16, rope=True, center=True)
    good = rms_rope_quantize(*given.arguments)
    given.x[0, 4, 70] = bad
    got = rms_rope_quantize(*given.arguments)
    rest = [0, 1, 2, 3, 5]
    assert got[0, 4, 64:128].float().isnan().all()
    assert torch.equal(got.view(torch.uint8)[0, rest], good.view(torch.uint8)[0, rest])
    assert got.float()[0, rest].isfinite().all()


def test_what_overflows_is_nan_and_not_the_largest_number() -> None:
    given = normed_heads((1, 6), 3, 64, torch.bfloat16, rope=False, center=False)
    given.factor[1] = 3e38
    got = rms_rope_quantize(*given.arguments).float().unflatten(-1, (3, 64))
    assert got[:, :, 1].isnan().float().mean() > 0.5 and not (got[:, :, 1].abs() == 448).all(-1).any()
    assert got[:, :, [0, 2]].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    given = normed_heads((1, 6), 3, 64, torch.bfloat16, rope=True, center=True)
    assert given.center is not None and given.table is not None
    room = torch.empty(1, 6, 192, dtype=E4M3)
    wrong = {
        "power of two": given._replace(head_dim=48),
        "do not split": given._replace(head_dim=128),
        "one per head": given._replace(factor=given.factor[:2]),
        r"center has shape \(3, 32\)": given._replace(center=given.center[:, :32]),
        "a row per token": given._replace(table=(given.table[0][1:], given.table[1])),
        "x has strides": given._replace(x=given.x.repeat(1, 1, 2)[..., :192]),
    }
    for run in (rms_rope_quantize_torch, rms_rope_quantize_triton):
        for words, one in wrong.items():
            with pytest.raises(ValueError, match=words):
                run(*one.arguments)
        for place in (room[:, :5], room.half(), torch.empty(1, 6, 384, dtype=E4M3)[..., :192]):
            with pytest.raises(ValueError, match="expected"):
                run(*given.arguments, into=place)
    with pytest.raises(ValueError, match="bf16 or fp16"):
        rms_rope_quantize_triton(*given._replace(x=given.x.float()).arguments)


def test_no_tokens_are_no_trouble() -> None:
    given = normed_heads((1, 6), 3, 64, torch.bfloat16, rope=False, center=False)
    for run in (rms_rope_quantize_torch, rms_rope_quantize_triton):
        assert run(*given._replace(x=given.x[:, :0]).arguments).shape == (1, 0, 192)
