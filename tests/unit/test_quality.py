"""The quality gates on a CPU: eight-bit attention and short sums on a trained model, bounds that can fail."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demo import eight_bits, quality
from demo.eight_bits import TWINS, TensorCoreLinear, tensor_core_sums, use_tensor_core_sums
from demo.quality import LATENTS, SCORE_POINTS, WIDE, Bound, Demo, latents_bound, wide_bound
from demo.scenes import render, scene_indices
from runtime.layers import backends
from runtime.linear.quantize import FP8, quantize_rows
from runtime.transformer import TransformerConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quality.md"
EIGHT = [name for name in TWINS if backends.BACKENDS[name].bits == 8]
SCALE = 128**-0.5


def off(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def hard(length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outlier channels in q and k, a large common mean in k, a mean in v."""
    g = torch.Generator().manual_seed(length + keys)
    q, k, v = (torch.randn(1, count, 2, 128, generator=g) for count in (length, keys, keys))
    k += 4 * torch.randn(2, 128, generator=g)
    v += torch.randn(2, 128, generator=g)
    for x in (q, k):
        x[..., [5, 77]] *= 6
    return q, k, v


# --- the twins ---


@pytest.mark.parametrize("name", EIGHT)
def test_twins_keep_the_bound_that_backends_are_proven_by(name: str) -> None:
    for length, keys in ((1, 70), (65, 65), (300, 300), (129, 513)):
        q, k, v = hard(length, keys)
        found = off(TWINS[name](q, k, v, SCALE), backends.math(q, k, v, SCALE))
        print(f"{name} {length} on {keys} keys: {found:.4f} from fp32")
        # It rounds (bf16 alone is .0018), and by less than a backend may.
        assert 0.002 < found < backends.BOUNDS[8]


def test_what_is_rounded_less_is_nearer() -> None:
    q, k, v = hard(300, 300)
    exact = backends.math(q, k, v, SCALE)
    found = {name: off(TWINS[name](q, k, v, SCALE), exact) for name in EIGHT}
    naive = off(eight_bits.one_scale_each(q, k, v, SCALE), exact)
    print(found, f"without care {naive:.4f}")
    assert found["sage2-fp16"] < min(found["sage2-fp32"], found["sage2"])
    assert naive > 2 * max(found.values())


def test_sums_of_half_precision_stay_in_range() -> None:
    """The largest sums: all keys are alike, so every weight is 1, and v is its own largest entry."""
    q, k = torch.randn(1, 2, 1, 128), torch.zeros(1, 640, 1, 128)
    v = torch.full((1, 640, 1, 128), -7.0)
    assert torch.equal(TWINS["sage2"](q, k, v, SCALE), v[:, :2])


# --- sums of tensor cores ---


def operands(depth: int, alike: float = 0.0) -> tuple[Tensor, Tensor]:
    """x and weight (24, depth), normal; row i of x has the cosine `alike` with row i of the weight."""
    g = torch.Generator().manual_seed(depth)
    x, weight = torch.randn(24, depth, generator=g), torch.randn(24, depth, generator=g)
    return alike * weight + (1 - alike**2) ** 0.5 * x, weight


def test_sums_are_those_that_were_measured_on_a_card() -> None:
    """Normal numbers, 13,824 of them: an H200 has 2.8e-3 with fast accumulation and 1.3e-4 without."""
    q, weight = (quantize_rows(x, FP8)[0] for x in operands(13824))
    exact = q.double() @ weight.double().t()
    fast, slow = (off(tensor_core_sums(q, weight, promoted=p), exact) for p in (None, 128))
    print(f"fast {fast:.2e}, promoted {slow:.2e}")
    assert 2.5e-3 < fast < 3.1e-3 and 1.1e-4 < slow < 1.5e-4
    assert off(tensor_core_sums(q, weight, fraction=40), exact) < 1e-6


@pytest.mark.parametrize("alike", [0.0, 0.3])
def test_why_fast_sums_are_off(alike: float) -> None:
    """Beside quantization they are nothing where terms cancel, and most of the error where they agree."""
    x, weight = operands(13824, alike)
    (q, a), (weight8, b) = quantize_rows(x, FP8), quantize_rows(weight, FP8)
    scale = (a * b.t()).double()
    real = (x.double() @ weight.double().t()).diagonal()
    exact = (q.double() @ weight8.double().t() * scale).diagonal()
    fast, slow = ((tensor_core_sums(q, weight8, promoted=p).double() * scale).diagonal() for p in (None, 128))
    quantized, short, promoted = off(exact, real), off(fast, exact), off(slow, exact)
    print(f"cosine {alike}: quantization {quantized:.4f}, fast {short:.4f}, promoted {promoted:.5f}")
    assert promoted < 5e-4
    if alike:
        assert 0.03 < short < 0.07 and short > 10 * quantized
        assert bool((fast.abs() < exact.abs()).all())  # they only lose
    else:
        assert short < 0.2 * quantized


def test_a_model_takes_on_short_sums() -> None:
    demo = quality.load("fp8")
    layer = demo.transformer.blocks[0].ffn[2]
    x = torch.randn(1, 4, layer.in_features, generator=torch.Generator().manual_seed(0))
    exact = layer(x)
    assert use_tensor_core_sums(demo.transformer, 13) == 60
    other = demo.transformer.blocks[0].ffn[2]
    assert isinstance(other, TensorCoreLinear) and other.weight is layer.weight
    short = off(other(x), exact)
    other.fraction = 7
    assert 1e-5 < short < 2e-3 < off(other(x), exact) < 0.1
    assert use_tensor_core_sums(quality.load("bf16").transformer) == 0


# --- a trained model ---


@pytest.fixture(scope="module")
def plain() -> Demo:
    return quality.load("bf16")


@pytest.fixture(scope="module")
def expected(plain: Demo) -> Tensor:
    """Latents of two scenes by the reference path."""
    with quality.attending(plain, quality.OneByOne(backends.math)):
        return quality.make_latents(plain, quality.asked(2), "euler", seed=3)


@pytest.mark.parametrize(("form", "name"), [("bf16", "sage2"), ("fp8", "cudnn-fp8")])
def test_eight_bit_attention_leaves_the_videos_right(
    form: str, name: str, plain: Demo, expected: Tensor
) -> None:
    """`make demo-score ATTENTION=...` does it for many."""
    demo, scenes = plain if form == "bf16" else quality.load(form), quality.asked(2)
    with quality.attending(demo, quality.of_backend(name, demo.device)):
        latents = quality.make_latents(demo, scenes, "euler", seed=3)
    found, bound = quality.distances(latents, expected), latents_bound(form, 8)
    print(f"{form} {name}: latents off by {[round(one, 4) for one in found.tolist()]}, {bound}")
    assert found.min() > 1e-3  # it was not torch that computed
    assert bound.holds(found)
    assert quality.score(quality.decode(demo, latents[:1]), scenes[:1])["all"] == 1.0


FAULTS = {
    "sixteen keys are forgotten": lambda q, k, v, s: backends.sdpa(q, k[:, :-16], v[:, :-16], s),
    "a scale is a tenth too large": lambda q, k, v, s: backends.sdpa(q, k, v, 1.1 * s),
    "NaN": lambda q, k, v, s: torch.full_like(q, float("nan")),
    "nothing": lambda q, k, v, s: torch.zeros_like(q),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_exceeds_the_bound(fault: str, plain: Demo, expected: Tensor) -> None:
    with quality.attending(plain, quality.OneByOne(FAULTS[fault])):
        latents = quality.make_latents(plain, quality.asked(2), "euler", seed=3)
    found = quality.distances(latents, expected)
    print(f"{fault}: {found.tolist()}")
    assert not latents_bound("bf16", 8).holds(found)


def test_the_command_judges(
    plain: Demo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = render(scene_indices(quality.asked(1)), torch.full((1, 2), 0.5))[0]  # (1, 3, F, H, W)
    frames = ((drawn + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    monkeypatch.setattr(quality, "load", lambda *_: plain)
    monkeypatch.setattr(quality, "decode", lambda *_: frames)
    ask = ["--attention", "sage2-fp16", "--videos", "1", "--sampler", "euler"]
    assert quality.main(ask) == 0
    said = capsys.readouterr().out
    assert "| bf16 sage2-fp16 euler | 1.000 |" in said and "| reference euler | 1.000 |" in said
    with monkeypatch.context() as patch:
        patch.setattr(quality, "make_latents", lambda *_, **__: torch.randn(1, 16, 5, 12, 20))
        assert quality.main(ask) == 1
    for wrong, message in (
        (["--attention", "sage9"], "no twin for a CPU; expected one of sage2"),
        (["--sums", "13", "--videos", "1"], "--sums is for --variant fp8"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            quality.main(wrong)


# --- the bounds ---


def test_bounds_add_up_and_hold_what_they_say() -> None:
    three_four = Bound(3, 0.3, 1) + Bound(4, 0.4, 2)
    assert (three_four.median, three_four.most, three_four.worst) == pytest.approx((5, 0.5, 2))
    bound, good = Bound(0.1, 0.2, 0.5), torch.full((20,), 0.05)
    for bad, values in {
        "median": [0.11] * 11,
        "most": [0.25] * 3,
        "worst": [0.6],
        "NaN": [float("nan")],
    }.items():
        off = good.clone()
        off[: len(values)] = torch.tensor(values)
        assert bound.holds(good) and not bound.holds(off), bad
    one_odd = good.clone()
    one_odd[7] = 0.4
    assert bound.holds(one_odd)
    for form in ("bf16", "fp8", "int8"):
        assert latents_bound(form, 8).median > latents_bound(form, 16).median >= LATENTS[form].median
        assert wide_bound(form, 8) > wide_bound(form, 16) >= WIDE[form]


def test_points_are_of_videos_that_are_all_right() -> None:
    assert quality.lost_points({"all": 0.95}, {"all": 1.0}) == pytest.approx(5.0)
    assert quality.lost_points({"all": 1.0}, {"all": 0.9}) < 0 < SCORE_POINTS


def test_the_page_quotes_the_bounds() -> None:
    page = PAGE.read_text()
    for name, bound in LATENTS.items():
        row = f"| {name} | {bound.median:g} | {bound.most:g} | {bound.worst:g} | {WIDE[name]:g} |"
        assert row in page, row
    assert f"{SCORE_POINTS:g} points" in page


def test_the_measurement_on_a_card_runs() -> None:
    """Its part of random blocks, small, with what a CPU has."""
    from tests.gpu import measure_quality

    config = TransformerConfig(256, 512, 2, 2, text_dim=64, text_len=16)
    found = measure_quality.of_full_width(
        torch.device("cpu"), ["sdpa", "sdpa-math"], config, (2, 4, 6), (1, 2)
    )
    assert found == []
    listed = measure_quality.paths(["sdpa", "sdpa-math", "sage2"])
    assert len(set(listed)) == len(listed) == 3 * 2 * 4 - 1 and measure_quality.REFERENCE not in listed
    assert {path.attention for path in listed[:6]} == {"sdpa", "sage2"}
