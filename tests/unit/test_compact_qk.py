"""Queries and keys that come in eight bits from their norm: levels, center, the model, its guard."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from demo import eight_bits, quality
from runtime.kernels import attention_quantize, channel_spread
from runtime.kernels.launch import E4M3
from runtime.layers import backends, compact_qk, hopper_fp8
from runtime.layers.attending import Attending
from runtime.layers.attention import attend
from runtime.layers.compact_qk import FEWEST, QKScales, compact_rows, levels_of, restored, some_tokens
from runtime.layers.norm import RMSNorm
from runtime.layers.rope import norm_rope, rope_table
from runtime.memory import costs
from runtime.samples import AttentionSample, KernelSample
from runtime.transformer import Transformer, TransformerConfig
from tests.live_memory import peak_of

CONFIG = TransformerConfig(dim=256, ffn_dim=384, num_heads=2, num_layers=3, text_dim=48, text_len=16)
HEADS, HEAD_DIM = 4, 128
HOPPER = quality.OneByOne(eight_bits.hopper, eight_bits.hopper_compact)


def norm(seed: int, width: int = HEADS * HEAD_DIM) -> RMSNorm:
    """With weights of a spread, some of them large, as a trained model's."""
    made = RMSNorm(width, 1e-6)
    made.weight.data = torch.randn(width, generator=torch.Generator().manual_seed(seed)).exp_()
    made.weight.data[5::HEAD_DIM] *= 8
    return made.requires_grad_(False)


def rows(count: int, seed: int, spike: float = 1.0) -> Tensor:
    """(1, count, HEADS·HEAD_DIM) bf16; a few numbers `spike` times the others."""
    x = torch.randn(1, count, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    x[..., 77] *= spike
    return x.bfloat16()


def compacted(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, QKScales]:
    """q and k (1, L, W) normalised and turned, (1, L, H, D) each; the same compact; and their scales."""
    table = rope_table((1, 1, q.shape[1]), HEAD_DIM, q)
    of_q, of_k = norm(1), norm(2)
    scales = QKScales(
        levels_of(of_q.weight, of_k.weight, HEADS),
        compact_qk.center_of(norm_rope(k.clone(), of_k, HEADS, table)),
    )
    q8 = compact_rows(q.clone(), of_q, HEADS, table, scales.levels.by_q)
    k8 = compact_rows(k.clone(), of_k, HEADS, table, scales.levels.by_k, scales.center)
    return norm_rope(q, of_q, HEADS, table), norm_rope(k, of_k, HEADS, table), q8, k8, scales


@pytest.mark.parametrize("spike", [1.0, 30.0, 1e6])
def test_scores_are_those_of_q_and_the_centered_k(spike: float) -> None:
    q, k, q8, k8, scales = compacted(rows(200, 3, spike), rows(200, 4, spike))
    for head in range(HEADS):
        k_ = k[0, :, head].double()
        exact = q[0, :, head].double() @ (k_ - k[0, :, head].float().mean(0).double()).t()
        got = q8[0, :, head].double() @ k8[0, :, head].double().t() * scales.levels.descale[head].double()
        # Of scores that are all next to nothing the softmax sees nothing.
        off = float((got - exact).norm() / exact.norm().clamp_min(1e-2 * exact.numel() ** 0.5))
        print(f"spike {spike:g}, head {head}: scores off by {off:.4f}")
        assert off < 0.045  # two roundings of .026
    for x8 in (q8, k8):
        assert x8.dtype == E4M3 and float(x8.float().abs().max()) < 448  # nothing saturates, whatever the row


def test_what_was_compacted_is_restored_up_to_its_rounding() -> None:
    q, k, q8, k8, scales = compacted(rows(150, 5, 9.0), rows(150, 6))
    for x, x8, by, center in (
        (q, q8, scales.levels.by_q, None),
        (k, k8, scales.levels.by_k, scales.center[:, None]),
    ):
        off = float((restored(x8, by, center) - x.float()).norm() / x.float().norm())
        print(f"restored: off by {off:.4f}")
        assert 0.01 < off < 0.03


def test_a_row_of_one_number_is_the_bound_itself() -> None:
    """All of a row in one place, where the weight is largest: no row can reach farther."""
    of = norm(9)
    place = int(of.weight.abs().argmax())
    x = torch.zeros(1, 1, HEADS * HEAD_DIM)
    x[..., place] = 5.0
    table = rope_table((1, 1, 1), HEAD_DIM, x)
    by = levels_of(of.weight, of.weight, HEADS).by_q
    head = compact_rows(x.bfloat16(), of, HEADS, table, by)[0, 0, place // HEAD_DIM].float()
    # A row of one number has √D more than its rotation spreads: √(D·W)·|w| / √D
    assert torch.equal(head.abs(), torch.full((HEAD_DIM,), float(head[0].abs())))
    assert float(head[0].abs()) == pytest.approx(448 / HEAD_DIM**0.5, rel=0.06)


def test_videos_of_a_batch_have_centers_of_their_own() -> None:
    one, other = rows(90, 1), 3 + rows(90, 2)
    both = compacted(torch.cat([one, other]), torch.cat([one, other]))
    for place, x in enumerate((one, other)):
        alone = compacted(x, x)
        for which in range(4):
            assert torch.equal(both[which][place].float(), alone[which][0].float())


@pytest.mark.parametrize("count", [64, 511, 3584, 3583, 20280, 32760, 75600])
def test_tokens_that_are_looked_at_are_enough_and_in_all_columns(count: int) -> None:
    seen = range(count)[some_tokens(count)]
    assert len(seen) >= min(count, 512) and len(seen) < 16 * 512
    for width in (52, 80, 45, 30):  # columns of a picture, in patches
        if count > 137 * width:
            assert len({token % width for token in seen}) == width


# --- the model ---


def model(slice_of: int | None = None) -> Transformer:
    torch.manual_seed(8)
    made = Transformer(CONFIG).requires_grad_(False).eval()
    for name, value in made.named_parameters():
        value.normal_(
            1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2 if value.ndim < 2 else 0.06
        )
    made.token_slice = slice_of
    return made


def velocity(of: Transformer, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(batch, 16, 2, 16, 20, generator=generator)  # 160 tokens
    text = torch.randn(batch, CONFIG.text_len, CONFIG.text_dim, generator=generator)
    with torch.inference_mode():
        return of(latents, torch.full((batch,), 700.0), text)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_model_makes_what_its_attention_takes() -> None:
    plain = model()
    exact = velocity(plain)
    seen: list[tuple[torch.dtype, ...]] = []

    def compact(q8: Tensor, k8: Tensor, v: Tensor, scales: QKScales, scale: float, out: Any) -> Tensor:
        seen.append((q8.dtype, k8.dtype, v.dtype))
        return eight_bits.hopper_compact(q8, k8, v, scales, scale, out)

    def never(*_: Any) -> Tensor:
        raise AssertionError("16-bit queries and keys, where compact ones are taken")

    plain.use_attention(quality.OneByOne(never, compact), attend)
    distance = off(velocity(plain), exact)
    plain.use_attention(quality.OneByOne(eight_bits.hopper), attend)
    apart = off(velocity(plain), exact)
    print(f"from fp32: compact {distance:.4f}, compacted in a pass of its own {apart:.4f}")
    assert seen == [(E4M3, E4M3, torch.float32)] * CONFIG.num_layers
    assert 1e-5 < distance < 1.3 * apart + 1e-3


@pytest.mark.parametrize("step", [7, 64, 159])
def test_slices_give_the_numbers_of_one_call(step: int) -> None:
    whole, sliced = model(), model(step)
    for one in (whole, sliced):
        one.use_attention(HOPPER, attend)
    found = off(velocity(sliced, 2), velocity(whole, 2))
    print(f"slices of {step}: off by {found:.2g}")
    assert found < 1e-3  # a sum in another order is a step of e4m3 here and there


def test_few_tokens_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.transformer.FEWEST", 161)
    mixed: list[torch.dtype] = []

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        mixed.append(q.dtype)
        return attend(q, k, v, scale)

    one = model(50)
    one.use_attention(quality.OneByOne(run, eight_bits.hopper_compact), attend)
    assert off(velocity(one), velocity(model())) < 1e-5 and mixed == [torch.float32] * CONFIG.num_layers
    assert FEWEST == hopper_fp8.SHORTEST


def test_levels_follow_the_weights_of_the_norms() -> None:
    one = model()
    one.use_attention(HOPPER, attend)
    before = velocity(one)
    attention: Any = one.blocks[0].self_attn
    attention.norm_k.weight = torch.nn.Parameter(attention.norm_k.weight * 4, requires_grad=False)
    other = model()
    other.blocks[0].self_attn.norm_k.weight.data *= 4  # type: ignore[union-attr, operator]
    other.use_attention(HOPPER, attend)
    assert torch.equal(velocity(one), velocity(other)) and not torch.equal(velocity(one), before)


# --- the guard ---


def sampled(of: Transformer, attention: quality.OneByOne) -> tuple[AttentionSample, KernelSample]:
    sample = AttentionSample(attention, 8, CONFIG.num_layers)
    kernels = KernelSample(of, sample)
    of.use_attention(sample, attend)
    sample.begin(0)
    kernels.begin(0)
    return sample, kernels


def test_the_guard_finds_compact_attention_right() -> None:
    of = model(50)
    sample, kernels = sampled(of, HOPPER)
    velocity(of)
    found, others = sample.numbers(), kernels.numbers()
    worst = float(found[:, 0].max()), float(others[:, 0].max())
    print(f"attention {worst[0]:.4f} of {sample.bound}, kernels {worst[1]:.4f} of {kernels.bound}")
    assert len(found) and len(others) and not found[:, 1].any() and not others[:, 1].any()
    assert 1e-4 < worst[0] < sample.bound and worst[1] < kernels.bound


@pytest.mark.parametrize("fault", ["zeros", "another head", "nan"])
def test_the_guard_finds_a_compact_attention_that_is_wrong(fault: str) -> None:
    def broken(
        q8: Tensor, k8: Tensor, v: Tensor, scales: QKScales, scale: float, out: Tensor | None
    ) -> Tensor:
        made = eight_bits.hopper_compact(q8, k8, v, scales, scale, out)
        if fault == "another head":
            return made.copy_(made.flip(2))
        return made.fill_(float("nan") if fault == "nan" else 0.0)

    of = model()
    sample, _ = sampled(of, quality.OneByOne(eight_bits.hopper, broken))
    velocity(of)
    found = sample.numbers()
    assert bool((~(found[:, 0] <= sample.bound) | (found[:, 1] > 0)).any())


@pytest.mark.parametrize("which", ["q", "k"])
def test_the_guard_finds_compact_rows_that_are_wrong(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite garbage: the rotation left out. The attention is right for what it gets; the kernels are not."""
    right = compact_qk.rms_rope_quantize
    calls = {"n": 0}

    def wrong(*given: Any) -> Tensor:
        calls["n"] += 1
        made: Tensor = right(*given)
        if (calls["n"] % 2 == 1) == (which == "q"):
            made.view(torch.uint8)[:, : HEAD_DIM // 2] ^= 128  # half of a head with the other sign
        return made

    monkeypatch.setattr(compact_qk, "rms_rope_quantize", wrong)
    of = model()
    sample, kernels = sampled(of, HOPPER)
    velocity(of)
    assert float(kernels.numbers()[:, 0].max()) > kernels.bound
    assert float(sample.numbers()[:, 0].max()) < sample.bound


# --- the backend ---


def test_compact_attention_is_as_close_as_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(q8: Tensor, *given: Any) -> Tensor:
        return given[-1].copy_(eight_bits.attend_torch(q8, *given[:-1]))

    monkeypatch.setattr(hopper_fp8, "_kernel", lambda: SimpleNamespace(attend=run))
    q, k, q8, k8, scales = compacted(
        torch.cat([rows(193, 3), rows(193, 5)]), torch.cat([rows(193, 4), rows(193, 6)])
    )
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(7)).bfloat16() + 0.5
    exact = backends.math(q.float(), k.float(), v.float(), HEAD_DIM**-0.5)
    kept = v.clone()
    fresh = hopper_fp8.run_compact(q8, k8, v, scales, HEAD_DIM**-0.5)
    assert torch.equal(v, kept)
    over = hopper_fp8.run_compact(q8, k8, v, scales, HEAD_DIM**-0.5, v)
    assert over is v and torch.equal(over, fresh)
    apart = hopper_fp8.run(q, k, kept, HEAD_DIM**-0.5)
    distances = off(fresh.float(), exact), off(apart.float(), exact)
    print(f"from fp32: compact {distances[0]:.4f}, compacted in a pass of its own {distances[1]:.4f}")
    assert 0.001 < distances[0] < 1.1 * distances[1] < 0.15  # sharp weights, far beyond a model's


def test_a_backend_says_whether_it_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert Attending("sdpa", device).compact is None
    monkeypatch.setattr(hopper_fp8, "_kernel", lambda: SimpleNamespace())
    monkeypatch.setattr(backends, "capability_of", lambda _: (9, 0))
    backends.available.cache_clear()
    try:
        assert compact_qk.compact_of(Attending("hopper-fp8", device)) is not None
    finally:
        backends.available.cache_clear()
    assert {name for name, one in backends.BACKENDS.items() if one.compact is not None} == costs.COMPACT


class Silent:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.mark.parametrize("token_slice", [4096, 11008])
def test_peak_memory_of_a_forward_is_what_the_plan_says(
    token_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full size on meta: what lives throughout, what attention adds, and what stays beside a slice."""
    for module in (attention_quantize, channel_spread):
        monkeypatch.setattr(module, "fused", lambda *_: True)
    monkeypatch.setattr(channel_spread, "_spread_kernel", Silent())
    monkeypatch.setattr(attention_quantize, "_to_columns_kernel", Silent())
    monkeypatch.setattr(hopper_fp8, "_kernel", lambda: SimpleNamespace(attend=lambda *given: given[-1]))
    monkeypatch.setattr(compact_qk, "rms_rope_quantize", lambda *given: given[-1])
    config = replace(CONFIG, dim=5120, ffn_dim=13824, num_heads=40, num_layers=2, text_dim=4096, text_len=512)
    with torch.device("meta"):
        big = Transformer(config).bfloat16().eval().requires_grad_(False)
    big.token_slice = token_slice
    big.use_attention(quality.OneByOne(hopper_fp8.run, hopper_fp8.run_compact), attend)
    state = 32760 * 5120 * 2
    x = torch.empty(1, 32760, 5120, dtype=torch.bfloat16, device="meta")
    time, text = (torch.empty(shape, device="meta") for shape in ((1, 6, 5120), (1, 512, 5120)))
    table = rope_table((21, 30, 52), 128, x)
    block: Any = big.blocks[0]
    peaks: list[int] = []

    def mix(*given: Any) -> Tensor:
        out: list[Tensor] = []
        peaks.append(peak_of(lambda: out.append(hopper_fp8.run_compact(*given[:4], 0.1, given[2]))))
        return out[0]

    noted = quality.OneByOne(hopper_fp8.run)
    noted.compact = mix
    block.self_attn.mix = noted
    qkv = big._workspace(x)
    assert qkv is not None
    held = (state + sum(one.numel() * one.element_size() for one in qkv)) / state
    with torch.inference_mode():
        block(x, time, text.bfloat16(), table, token_slice, qkv)
    print(f"held {held:.3f} U, attention {peaks[0] / state:.4f} U beside it")
    assert held == costs.held_states("hopper-fp8") == 3
    assert (
        costs.states_beside("hopper-fp8") * state
        < peaks[0]
        < (costs.states_beside("hopper-fp8") + 0.01) * state
    )
