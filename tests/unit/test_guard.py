"""What must never leave the engine, and what must never be stopped: the numbers of steps and frames."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.errors import OutputCheckError
from runtime.guard import WIDE, Fault, Numbers, check_decoded, check_frames, judge, measure
from runtime.layers.attention import attend
from runtime.layers.backends import BOUNDS
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.samples import ROW_MARGIN, AttentionSample
from runtime.schema import Envelope
from tests.measure_envelope import ranges, watched

SCENES = ("a red circle moves left on a black background", "a cyan square is still on a navy background")
TRAINED = Envelope(velocity=(1.0, 1.97), clean=(0.66, 1.47), noise=(0.94, 1.06), leak=0.2)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def seen(velocity: Tensor, x: Tensor, sigma: float, envelope: Envelope | None = None) -> Fault | None:
    return judge(measure(velocity, x, x - sigma * velocity, sigma).tolist(), envelope)


# ------------------------------------------------------------------------------------------------------ steps


@settings(max_examples=30)
@given(st.data())
def test_honest_steps_pass_at_any_size(data: st.DataObject) -> None:
    length, half_height, half_width = (data.draw(st.integers(1, most)) for most in (6, 9, 9))
    shape = (1, 16, length, 2 * half_height, 2 * half_width)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    start, picture, random = (torch.randn(shape, generator=generator) for _ in range(3))
    sigma = data.draw(st.sampled_from([1.0, 0.9375, 0.8333, 0.625, 0.3]))
    x = (1 - sigma) * picture + sigma * start
    trained = TRAINED if length * half_height * half_width >= 64 else None  # fewer tokens are no sample
    assert seen(start - picture, x, sigma, trained) is None
    # A model of random weights answers with what has nothing to do with its input.
    assert seen(random * data.draw(st.floats(0.2, 4.0)), x, sigma) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found(value: float) -> None:
    x, velocity = noise(1, 16, 3, 8, 8), noise(1, 16, 3, 8, 9)[..., :8].clone()
    velocity[0, 3, 1, 2, 2] = value
    fault = seen(velocity, x, 0.9)
    assert fault is not None and not fault.origin and "1 numbers of the velocity are not finite" in str(fault)


@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 256])
def test_a_tile_that_is_written_twice_is_found(tokens: int) -> None:
    x = noise(1, 16, 5, 16, 24)  # 480 tokens
    velocity = noise(1, 16, 5, 16, 26)[..., :24].clone()
    assert seen(velocity, x, 0.9) is None
    rows = velocity[0].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(1, 2, 4, 0, 3, 5)
    rows = rows.flatten(0, 2).clone()  # (L, 16, 2, 2)
    rows[300] = rows[300 - tokens]
    back = rows.unflatten(0, (5, 8, 12)).permute(3, 0, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)[None]
    fault = seen(back, x, 0.9)
    assert fault is not None and "repeat" in str(fault)


def test_the_last_rows_at_zero_a_flat_step_and_a_repeated_frame_are_found() -> None:
    x, velocity = noise(1, 16, 3, 16, 16), noise(1, 16, 3, 16, 17)[..., :16].clone()
    for broken in ("rows", "all", "frame"):
        wrong = velocity.clone()
        if broken == "rows":
            wrong[:, :, 2, 14:] = 0
        elif broken == "all":
            wrong[:] = 0.3
        else:
            wrong[:, :, 2] = wrong[:, :, 1]
        assert seen(wrong, x, 0.9) is not None, broken


def test_an_envelope_knows_a_velocity_of_something_else() -> None:
    start, picture = noise(1, 16, 5, 12, 20), noise(1, 16, 5, 12, 21)[..., :20]
    for sigma in (1.0, 0.9375, 0.8333, 0.625):
        x = (1 - sigma) * picture + sigma * start
        garbage = 1.4 * noise(1, 16, 5, 12, 22)[..., :20]  # of the right deviation
        assert seen(garbage, x, sigma, WIDE) is None
        fault = seen(garbage, x, sigma, TRAINED)
        print(f"sigma {sigma}: {fault}")
        assert fault is not None


def test_latents_that_are_flat_or_not_finite_are_found() -> None:
    good = measure(noise(1, 16, 2, 4, 4), noise(1, 16, 2, 4, 5)[..., :4], noise(1, 16, 2, 4, 4), 1.0).tolist()
    assert judge(good) is None
    fields = list(Numbers.__dataclass_fields__)
    for name, value, words in (("bad_latents", 3.0, "3 numbers"), ("latents", 1e-4, "flat")):
        wrong = [value if field == name else kept for field, kept in zip(fields, good, strict=True)]
        assert words in str(judge(wrong))


def test_an_attention_that_saw_bad_numbers_is_not_blamed() -> None:
    good = measure(noise(1, 16, 2, 4, 4), noise(1, 16, 2, 4, 5)[..., :4], noise(1, 16, 2, 4, 4), 1.0).tolist()
    first = judge(good, None, [[0.001, 0.0], [0.5, 0.0], [0.0, 1.0]], 0.04)
    assert first is not None and first.origin == "attention" and "sample 2 of 3" in str(first)
    assert judge(good, None, [[0.001, 0.0], [0.0, 1.0], [0.5, 0.0]], 0.04) is None
    nothing = judge(good, None, [[float("nan"), 0.0]], 0.04)
    assert nothing is not None and nothing.origin == "attention"


# -------------------------------------------------------------------------------------------------- attention


@settings(max_examples=25)
@given(st.data())
def test_honest_attention_passes_at_any_size(data: st.DataObject) -> None:
    length, heads = (data.draw(st.integers(1, most)) for most in (300, 4))
    width = data.draw(st.integers(16, 128))  # of fewer numbers all may cancel out at once; no model has such
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    scale = data.draw(st.floats(0.1, 4.0))
    q, k, v = (
        (scale * torch.randn(1, length, heads, width, generator=generator)).to(dtype) for _ in range(3)
    )
    sample = AttentionSample(attend, 16)
    sample.begin(data.draw(st.integers(0, 3)))
    for _ in range(3):
        assert torch.equal(sample(q, k, v), attend(q, k, v))
    distances = sample.numbers()
    assert bool((distances[:, 0] <= sample.bound).all()) and not distances[:, 1].any()


def emulated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with q and k in 8-bit integers by tokens, weights and v in e4m3: what 8-bit backends do."""

    def whole(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    q, k, v = (x.transpose(1, 2).float() for x in (q, k - k.mean(1, keepdim=True), v))
    weights = (whole(q) @ whole(k).transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    step = v.abs().amax(-2, keepdim=True) / 448
    e4m3 = torch.float8_e4m3fn
    top = weights.amax(-1, keepdim=True) / 448
    out = ((weights / top).to(e4m3).float() * top) @ ((v / step).to(e4m3).float() * step)
    return out.transpose(1, 2)


def test_eight_bits_lie_within_their_bound() -> None:
    worst = 0.0
    generator = torch.Generator().manual_seed(4)
    for length in (65, 1100):
        for spread in (0.3, 1.0, 3.0):
            q, k, v = (torch.randn(1, length, 2, 128, generator=generator) for _ in range(3))
            k[..., ::16] += 2.0  # large channels that all keys share, as the model's have
            sample = AttentionSample(emulated, 8)
            sample.begin(0)
            for _ in range(4):
                sample(spread * q, k, v + 0.5)
            worst = max(worst, float(sample.numbers()[:, 0].max()))
    print(f"8 bits: a row at most {worst:.3f} from the formula, bound {ROW_MARGIN * BOUNDS[8]:.2f}")
    assert 0.01 < worst < 0.5 * ROW_MARGIN * BOUNDS[8]


def test_the_sampled_rows_are_the_same_in_each_run_and_others_in_each_call() -> None:
    q, rows = torch.randn(1, 5000, 4, 8), []
    for step in (0, 0, 1):
        sample = AttentionSample(attend, 16)
        sample.begin(step)
        chosen = []
        for _ in range(70):
            some, _, heads = sample._chosen(q)
            sample._made.append(torch.zeros(2))
            chosen.append((tuple(some.tolist()), heads.start, heads.step))
        rows.append(chosen)
    assert rows[0] == rows[1] != rows[2]
    assert len(set(rows[0])) == 70 and all(4999 in some for some, *_ in rows[0])


# ----------------------------------------------------------------------------------------------------- frames


def film(count: int = 17, seed: int = 0, motion: float = 6.0) -> tuple[np.ndarray, Tensor]:
    """A textured picture that drifts by, and latents that vary as it does."""
    generator = torch.Generator().manual_seed(seed)
    texture = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 40, generator=generator), scale_factor=8)[
        0
    ]
    frames = [
        texture[:, :64, round(motion * number) % 200 :][:, :, :96] * 220 + 15 for number in range(count)
    ]
    noise = torch.randn(count, 64, 96, 3, generator=generator)
    video = torch.stack(frames).permute(0, 2, 3, 1) + noise * (1 if motion else 0.3)
    latents = torch.randn(1, 16, (count + 3) // 4, 8, 12, generator=generator)
    if not motion:
        latents = latents[:, :, :1] + 0.01 * latents
    return video.round().clamp(0, 255).to(torch.uint8).numpy(), latents


def test_good_frames_pass() -> None:
    for seed in range(5):
        for motion in (6.0, 0.4, 0.0):
            check_frames(*film(seed=seed, motion=motion))
    check_decoded(noise(1, 3, 4, 8, 8), 0)


def test_a_still_video_passes_even_where_its_frames_are_equal() -> None:
    frames, latents = film(motion=0.0)
    frames[:] = frames[0]
    check_frames(frames, latents)


def test_fades_and_black_ends_pass() -> None:
    frames, latents = film(33)
    fading = np.clip(np.abs(np.linspace(-1.2, 1.2, 33)) - 0.1, 0, 1)
    fades = (frames * fading[:, None, None, None]).astype(np.uint8)  # to black and back, by degrees
    assert (fades.reshape(33, -1).std(1) < 0.5).any()
    check_frames(fades, latents)
    ended = frames.copy()
    ended[21:] = 0
    dark = latents.clone()
    dark[:, :, 6:] = 0.1 * dark[:, :, 6:] + 1.0
    check_frames(ended, dark)


@pytest.mark.parametrize(("first", "last"), [(8, 8), (5, 8), (0, 0), (16, 16), (13, 16)])
@pytest.mark.parametrize("level", [0, 127, 255])
def test_a_black_frame_between_others_is_found(first: int, last: int, level: int) -> None:
    frames, latents = film()
    frames[first : last + 1] = level
    with pytest.raises(OutputCheckError, match="one flat colour between others"):
        check_frames(frames, latents)


def test_frames_that_repeat_those_before_are_found() -> None:
    frames, latents = film()
    frames[9:13] = frames[5:9]
    with pytest.raises(OutputCheckError, match="Frames 9 to 12 repeat"):
        check_frames(frames, latents)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pixels_that_are_not_finite_are_placed(value: float) -> None:
    frames = noise(1, 3, 4, 8, 8)
    frames[0, 0, 3, 7, 7] = value
    with pytest.raises(OutputCheckError, match="frame 5"):
        check_decoded(frames, 5)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_video_of_one_colour_is_refused(level: int) -> None:
    frames = np.full((5, 16, 16, 3), level, np.uint8)
    with pytest.raises(OutputCheckError, match="flat"):
        check_frames(frames)
    frames[:, :4, :4] = (level + 100) % 256  # a small object is a picture
    check_frames(frames)


def test_a_video_is_refused_for_its_deviation_alone() -> None:
    """Few frames may prove that a video varies, and none are overlooked: as numpy sees the whole."""
    random = np.random.default_rng(8)
    refused, count = 0, 200
    for _ in range(count):
        frames = np.full((6, 4, 6, 3), random.integers(0, 255), np.uint8)
        changed = random.integers(0, frames.size, random.integers(1, 7))
        frames.reshape(-1)[changed] += random.integers(1, 20, len(changed)).astype(np.uint8)
        flat = frames.astype(np.float64).std() < 0.5
        try:
            check_frames(frames)
        except OutputCheckError as error:
            assert flat and f"standard deviation {frames.astype(np.float64).std():.2f} of" in str(error)
            refused += 1
        else:
            assert not flat
    print(f"{refused} of {count} are flat")
    assert 20 < refused < count - 20


# ------------------------------------------------------------------------------------------------ real videos


@pytest.mark.parametrize("model", ["demo", "demo-fp8", "demo-int8"])
def test_real_videos_pass_with_room_to_spare(model: str) -> None:
    """Moving and still scenes of the trained demo; how near each number comes to its bound is printed."""
    with Pipeline.load(model=model, profile="cpu", device="cpu") as pipe, watched() as seen:
        bound = pipe.manifest.envelope
        assert bound is not None
        for seed, sampler in ((1, "lcm"), (2, "euler")):
            (*_, last) = pipe.stages(Request(prompt=SCENES[seed - 1], seed=seed, sampler=sampler))
            assert last.video is not None and "fell_back" not in last.video.metadata
    assert len(seen) == 8 and not pipe.ways.fell_back
    limits = {"velocity": bound.velocity, "clean": bound.clean, "noise": bound.noise, "leak": (0, bound.leak)}
    for name, (low, high) in ranges(seen).items():
        least, most = limits[name]
        print(f"{model} {name}: {low:.3f} to {high:.3f}, bound {least:g} to {most:g}")
        assert least <= low and high <= most
