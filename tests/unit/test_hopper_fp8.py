"""Our FP8 attention for Hopper with no card: where keys lie, the passes before it, its memory, its place.

Its machine code is read by `test_hopper_compiles.py`.
"""

import importlib
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.kernels import attention_quantize as passes
from runtime.kernels import channel_spread, launch
from runtime.kernels.attention_in_columns import attend_torch
from runtime.kernels.launch import E4M3
from runtime.layers import backends, hopper_fp8
from runtime.layers.attending import Attending
from runtime.layers.attention import attend
from tests.live_memory import peak_of
from tests.unit.test_cudnn_fp8 import distance, lifelike, random

CPU = torch.device("cpu")
SCALE = 128**-0.5
MODULE = "runtime.kernels.hopper_attention"
kernel: Any = None
missing = "interpreted: Gluon is only ever compiled"
if not launch.INTERPRETED:
    try:
        kernel = importlib.import_module(MODULE)
    except ImportError as error:
        missing = str(error)
needs_kernel = pytest.mark.skipif(kernel is None, reason=missing)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The kernel's twin stands for the kernel; the shapes that it was called with."""
    seen: list[torch.Size] = []

    def run(q8: Tensor, *given: Any) -> Tensor:
        seen.append(q8.shape)
        return given[-1].copy_(attend_torch(q8, *given[:-1]))

    monkeypatch.setattr(hopper_fp8, "_kernel", lambda: SimpleNamespace(attend=run))
    return seen


# --- the order of the keys ---


def keys_of_scores(lane: int, keys: int) -> list[int]:
    """Columns of a row that one of its 4 lanes has after wgmma.m64nNk32: fp32, in the registers' order."""
    return [8 * eight + 2 * lane + b for eight in range(keys // 8) for b in range(2)]


def slots_of_operand(lane: int, keys: int) -> list[int]:
    """k of a row that this lane gives to wgmma.m64nNk32 as left factor: bytes, in the registers' order."""
    return [
        32 * product + 16 * half + 4 * lane + byte
        for product in range(keys // 32)
        for half in range(2)
        for byte in range(4)
    ]


@pytest.mark.parametrize("count", [32, 128, 256])
def test_slots_are_what_registers_hold(count: int) -> None:
    order = passes.slots(count, CPU).tolist()
    assert sorted(order) == list(range(count))
    for lane in range(4):
        assert [order[slot] for slot in slots_of_operand(lane, count)] == keys_of_scores(lane, count)


def test_slots_come_in_sixteens() -> None:
    for count in (16, 48, 128):
        order = passes.slots(count, CPU)
        assert torch.equal(order // 16, torch.arange(count) // 16)
    with pytest.raises(RuntimeError):
        passes.slots(24, CPU)


@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_columns_are_the_values_in_slots(length: int) -> None:
    _, _, v = random(length)
    center, factor = torch.randn(3, 128), torch.rand(3, 128) * 50
    columns = passes.to_columns(v, center, factor)
    padded = -(-length // 128) * 128
    assert columns.shape == (3 * 128, padded) and columns.dtype == E4M3 and columns.is_contiguous()
    behind = passes.slots(padded, CPU) >= length
    assert not columns.view(torch.uint8)[:, behind].any()
    plain = passes.to_eight_bits(v, center, factor, rotate=False)  # (1, S, 3, 128)
    for slot, key in enumerate(passes.slots(padded, CPU).tolist()):
        if key < length:
            assert torch.equal(columns[:, slot].float(), plain[0, key].flatten().float())
    with pytest.raises(ValueError, match="2 batches"):
        passes.to_columns(v.expand(2, -1, -1, -1), center, factor)


# --- eight bits by sample ---


def by_sample(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    given = passes.quantize_by_sample(q, k, v)
    return attend_torch(given.q[0], given.k[0], given.v, given.descale, given.factor, given.center, SCALE)[
        None
    ]


def one_sided(length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return backends.one_sided(length, keys, 3, 128, torch.bfloat16, CPU)


def pick(make: Callable[[int], tuple[Tensor, ...]]) -> Callable[[int, int], tuple[Tensor, ...]]:
    """As many queries and as many keys."""

    def rows(length: int, keys: int) -> tuple[Tensor, ...]:
        q, k, v = make(max(length, keys))
        return q[:, :length], k[:, :keys], v[:, :keys]

    return rows


# On random values the output is a mean of noise: the rounding of a weight is as large beside it as beside 1.
KINDS: dict[str, tuple[Callable[[int, int], tuple[Tensor, ...]], float]] = {
    "random": (pick(random), 0.056),
    "lifelike": (pick(lifelike), 0.025),
    "one-sided": (one_sided, 0.009),
}


@needs_kernel
@pytest.mark.parametrize(("length", "keys"), [(64, 64), (65, 191), (191, 65), (513, 513), (70, 2100)])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_by_sample_are_close_to_fp32(kind: str, length: int, keys: int) -> None:
    make, bound = KINDS[kind]
    q, k, v = make(length, keys)
    exact = backends.math(q.float(), k.float(), v.float(), SCALE)
    off = distance(by_sample(q, k, v), exact)
    print(f"{kind} {length} on {keys}: {off:.4f}")
    assert 0.001 < off < bound <= backends.BOUNDS[8]


def narrow(length: int, seed: int = 0) -> list[Tensor]:
    """q, k, v (1, length, 1, 16)."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, 1, 16, generator=g).bfloat16() for _ in range(3)]


def scales(given: passes.Quantized) -> Tensor:
    return torch.cat([given.descale.flatten(), given.factor.flatten(), given.center.flatten()])


MANY = passes._EVERY * passes._ENOUGH + 5


def test_of_few_rows_all_are_looked_at_and_of_many_some() -> None:
    few = narrow(2 * passes._ENOUGH - 1)
    before = scales(passes.quantize_by_sample(*few))
    for which in range(3):
        for row in (1, 700, 2 * passes._ENOUGH - 2):
            changed = [x.clone() for x in few]
            changed[which][0, row] *= 1e4
            assert not torch.equal(scales(passes.quantize_by_sample(*changed)), before)
    many = narrow(MANY)
    before = scales(passes.quantize_by_sample(*many))
    unseen = torch.arange(MANY) % passes._EVERY != 0
    for which in range(3):
        changed = [x.clone() for x in many]
        changed[which][:, unseen] *= 1e4
        assert torch.equal(scales(passes.quantize_by_sample(*changed)), before)
        changed[which][:, passes._EVERY * 33] *= 1e4
        assert not torch.equal(scales(passes.quantize_by_sample(*changed)), before)


def test_rows_beyond_the_sample_fit_eight_times_over_then_saturate() -> None:
    q, k, v = narrow(MANY)
    found = channel_spread.spread_torch(v[:, :: passes._EVERY])
    reach = torch.maximum(found.high - found.mean, found.mean - found.low)
    v[0, 7] = found.mean + 7.9 * reach
    for x in (q, k, v):
        x[0, 9] *= 1e6
    given = passes.quantize_by_sample(q, k, v)
    order = passes.slots(given.v.shape[1], CPU).tolist()
    back = given.v[:, order.index(7)].float() * given.factor.flatten() + given.center.flatten()
    off = float(((back - v[0, 7].float().flatten()) / v[0, 7].float().flatten()).abs().max())
    print(f"eight times the reach: off by {off:.3f} at most")
    assert off < 1 / 16
    for x8 in (given.q[0, 9, 0].float(), given.k[0, 9, 0].float(), given.v[:, order.index(9)].float()):
        assert (x8.abs() == 448).all()
    for x8 in (given.q, given.k, given.v):
        assert x8.float().isfinite().all()


def test_nan_stays_nan_and_spoils_no_other_row() -> None:
    q, k, v = narrow(MANY)
    for x in (q, k, v):
        x[0, 11, 0, 3] = float("nan")  # of a row that is not looked at
    given = passes.quantize_by_sample(q, k, v)
    order = passes.slots(given.v.shape[1], CPU)
    v8 = torch.empty_like(given.v.float())
    v8[:, order] = given.v.float()
    for x8 in (given.q[0, :, 0].float(), given.k[0, :, 0].float()):
        assert x8[11].isnan().all() and x8[torch.arange(MANY) != 11].isfinite().all()
    assert v8[3, 11].isnan() and int(v8.isnan().sum()) == 1


def test_each_head_has_its_own_scale() -> None:
    q, k, v = (x.float() for x in lifelike(300))
    q[:, :, 1] *= 1e3
    k[:, :, 2] *= 1e-3
    given = passes.quantize_by_sample(*(x.bfloat16() for x in (q, k, v)))
    assert given.descale.shape == (3,)
    ratio = given.descale / passes.quantize_by_sample(*lifelike(300)).descale
    assert ratio.tolist() == pytest.approx([1, 1e3, 1e-3], rel=0.01)
    for head in range(3):
        k_ = k[0, :, head].double()
        exact = q[0, :, head].double() @ (k_ - k_.mean(0)).t()
        got = given.q[0, :, head].double() @ given.k[0, :, head].double().t() * given.descale[head].double()
        off = float((got - exact).norm() / exact.norm())
        print(f"head {head}: scores off by {off:.4f}")
        assert off < 0.045  # two roundings of .026


def test_equal_keys_and_values_are_exact() -> None:
    q, _, _ = random(70)
    k, v = (torch.full_like(q, value) for value in (-30.0, 1.5))
    given = passes.quantize_by_sample(q, k, v)
    assert not given.k.float().any() and not given.v.float().any()
    assert torch.equal(given.center, torch.full((3, 128), 1.5)) and given.factor.isfinite().all()


def test_heads_that_cannot_be_rotated_are_refused() -> None:
    x = torch.randn(1, 70, 2, 96).bfloat16()
    with pytest.raises(ValueError, match="heads of 96 cannot be rotated"):
        passes.quantize_by_sample(x, x, x)


# --- the backend ---


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_the_backend_is_close_to_fp32(kind: str, calls: list[torch.Size]) -> None:
    make, bound = KINDS[kind]
    q, k, v = make(193, 257)
    exact = backends.math(q.float(), k.float(), v.float(), SCALE)
    kept = [x.clone() for x in (q, k, v)]
    out = hopper_fp8.run(q, k, v, SCALE)
    print(f"{kind}: {distance(out, exact):.4f}")
    assert out.dtype == q.dtype and out.shape == q.shape and distance(out, exact) < bound
    assert all(torch.equal(*pair) for pair in zip((q, k, v), kept, strict=True))
    mine = q.clone(memory_format=torch.contiguous_format)
    over = hopper_fp8.run_over(mine, k, v, SCALE)
    assert over.data_ptr() == mine.data_ptr() and torch.equal(over, out)
    assert torch.equal(k, kept[1]) and torch.equal(v, kept[2])
    assert calls == [(193, 3, 128)] * 2


@needs_kernel
def test_rows_that_are_apart_are_not_written_to(calls: list[torch.Size]) -> None:
    wide = torch.randn(1, 80, 3, 3, 128).bfloat16()
    q, k, v = wide.unbind(2)  # as slices of one product
    before = wide.clone()
    out = hopper_fp8.run_over(q, k, v, SCALE)
    assert torch.equal(wide, before) and out.is_contiguous()
    assert torch.equal(out, hopper_fp8.run(q.contiguous(), k.contiguous(), v.contiguous(), SCALE))


@needs_kernel
def test_a_batch_is_one_after_another(calls: list[torch.Size]) -> None:
    q, k, v = (torch.cat([one, 3 * other]) for one, other in zip(random(70), random(70, seed=9), strict=True))
    both = hopper_fp8.run(q, k, v, SCALE)
    each = [hopper_fp8.run(q[i : i + 1], k[i : i + 1], v[i : i + 1], SCALE) for i in range(2)]
    assert torch.equal(both, torch.cat(each))
    assert torch.equal(hopper_fp8.run_over(q, k, v, SCALE), both) and len(calls) == 6


def test_few_tokens_or_keys_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_fp8, "_kernel", lambda: pytest.fail("the kernel was asked for"))
    q, k, v = lifelike(200)
    for length, keys in ((200, 63), (63, 200), (1, 1)):
        given = (q[:, :length], k[:, :keys], v[:, :keys])
        expected = attend(*given, SCALE)
        for run in (hopper_fp8.run, hopper_fp8.run_over):
            out = run(*given, SCALE)
            assert torch.equal(out, expected) and out.data_ptr() != q.data_ptr()


@needs_kernel
def test_heads_of_another_size_are_refused() -> None:
    x = torch.randn(1, 70, 2, 64).bfloat16()
    for run in (hopper_fp8.run, hopper_fp8.run_over):
        with pytest.raises(ValueError, match="heads of 64, expected 128"):
            run(x, x, x, 0.125)


@needs_kernel
def test_it_is_proven_like_the_others(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "capability_of", lambda _: (9, 0))
    backends.available.cache_clear()
    try:
        proof = backends.prove("hopper-fp8", CPU)
        print(proof)
        assert proof.ok and proof.distance > 0.004 and (128, 3, 128) in calls
        assert backends.named("hopper-fp8", CPU) is hopper_fp8.run
        assert Attending("hopper-fp8", CPU)._run is hopper_fp8.run_over
        assert "heads of 96" in backends.prove("hopper-fp8", CPU, head_dim=96).reason
        monkeypatch.setattr(hopper_fp8, "_kernel", lambda: kernel)  # which refuses these before any launch
        assert "heads of 64, expected 128" in backends.prove("hopper-fp8", CPU, head_dim=64).reason
    finally:
        backends.available.cache_clear()


class Silent:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.mark.parametrize(("run", "extra"), [(hopper_fp8.run_over, 1.5), (hopper_fp8.run, 2.5)])
def test_peak_memory_is_that_of_the_copies(
    run: backends.Run, extra: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the card: what the kernels' callers allocate, at full size, with kernels that do nothing.

    The plan's memory is that of compact queries and keys (`test_compact_qk.py`).
    """
    for module in (passes, channel_spread):
        monkeypatch.setattr(module, "fused", lambda *_: True)
    monkeypatch.setattr(channel_spread, "_spread_kernel", Silent())
    for name in ("_to_eight_bits_kernel", "_to_columns_kernel"):
        monkeypatch.setattr(passes, name, Silent())
    attend_nothing = SimpleNamespace(attend=lambda *given: given[-1])
    monkeypatch.setattr(hopper_fp8, "_kernel", lambda: attend_nothing)
    q, k, v = (torch.empty(1, 32760, 40, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    one = q.numel() * q.element_size()
    peak = peak_of(lambda: run(q, k, v, SCALE))
    print(f"{run.__name__} beside q, k, v: {peak / one:.4f} tensors")
    assert extra * one < peak < (extra + 0.01) * one


# --- where it is found ---


def test_it_is_for_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (hopper_fp8.find((9, 0)) is hopper_fp8.run) == (kernel is not None)
    monkeypatch.setattr(hopper_fp8, "_kernel", lambda: SimpleNamespace())
    assert hopper_fp8.find((9, 0)) is hopper_fp8.run
    for other in ((8, 0), (8, 9), (10, 0), (10, 3), (12, 0)):
        assert hopper_fp8.find(other) is None


def test_it_is_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_fp8, "INTERPRETED", True)
    assert hopper_fp8.find((9, 0)) is None


@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("version", ["3.2.0", "3.5.1"])
def test_an_older_triton_is_refused_with_the_reason(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.triton, "__version__", version)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=f"Triton {re.escape(version)} has no Gluon.*expected 3.6 or later"):
        importlib.import_module(MODULE)
    assert hopper_fp8.find((9, 0)) is None


@pytest.mark.parametrize("fault", [ImportError, AttributeError])
def test_a_gluon_that_changed_is_none(fault: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: str) -> object:
        raise fault("module 'triton.experimental.gluon.language' has no attribute 'warp_specialize'")

    monkeypatch.setattr(hopper_fp8.importlib, "import_module", load)
    assert hopper_fp8.find((9, 0)) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_bad_number_in_a_row_that_is_not_looked_at_does_not_become_a_good_one(
    which: int, bad: float
) -> None:
    given = random(20_000, heads=1)
    row = 17 * 900 + 5
    assert passes._sample(given[which]).data_ptr() == given[which].data_ptr()
    assert len(range(0, 20_000, 17)) == passes._sample(given[which]).shape[1]  # so that this row is not among
    given[which][0, row, 0, 9] = bad
    made = passes.quantize_by_sample(*given)
    eight = (made.q[0, row], made.k[0, row], made.v[9])[which]
    assert eight.float().isnan().any()
