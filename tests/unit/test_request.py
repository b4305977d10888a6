"""Requests: what a model cannot do is refused with numbers that it can do."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import RequestError
from runtime.profiles import load_manifest
from runtime.request import CheckedRequest, Request, check
from runtime.schema import ModelManifest

DISTILLED = load_manifest("wan2.1-t2v-14b-4step-fp8")
GPU = "cuda:0"
BASE = Request(prompt="A red fox runs in snow.")
# Both sides of every limit, numbers of the size that people type, and numbers that nobody should.
NUMBERS = st.one_of(st.integers(-20, 20), st.integers(-5000, 20000), st.integers(), st.integers(16300, 16500))


def undistilled() -> ModelManifest:
    fields = DISTILLED.model_dump()
    fields["sampling"] |= {"distilled": False, "guidance": 5.0, "steps": 50}
    return DISTILLED.model_copy(update={"sampling": DISTILLED.sampling.model_validate(fields["sampling"])})


def refusal(manifest: ModelManifest = DISTILLED, **fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        check(replace(BASE, **fields), manifest, GPU)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("field", ["height", "width", "frames"])
@given(value=NUMBERS)
def test_a_size_passes_or_its_nearest_values_do(field: str, value: int) -> None:
    try:
        checked = check(replace(BASE, **{field: value}), DISTILLED, GPU)
    except RequestError as error:
        message = str(error)
        assert message.startswith(f"{field} is {value};")
        nearest = [int(number) for number in re.findall(r"\d+", message.split("Nearest:")[1])]
        assert 1 <= len(nearest) <= 2
        for near in nearest:
            assert getattr(check(replace(BASE, **{field: near}), DISTILLED, GPU), field) == near
        if len(nearest) == 2:  # the value lies between them
            assert nearest[0] < value < nearest[1]
    else:
        assert getattr(checked, field) == value
        frames, height, width = checked.frames, checked.height, checked.width
        assert checked.latent_shape == (16, (frames + 3) // 4, height // 8, width // 8)
        assert height % 16 == width % 16 == 0 and frames % 4 == 1


@pytest.mark.parametrize(("field", "value"), [("height", 480), ("width", 832), ("frames", 81), ("frames", 1)])
def test_the_published_sizes_pass(field: str, value: int) -> None:
    assert getattr(check(replace(BASE, **{field: value}), DISTILLED, GPU), field) == value


def test_what_is_left_out_is_the_models_own() -> None:
    checked = check(Request(), DISTILLED, GPU)
    assert checked == CheckedRequest(
        prompt=DISTILLED.defaults.prompt,
        seed=42,
        height=480,
        width=832,
        frames=81,
        fps=16,
        steps=4,
        sampler="lcm",
        shift=5.0,
        guidance=1.0,
        negative_prompt="",
        noise_device="cpu",
    )


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    assert "empty" in refusal(prompt=prompt)


@given(seed=st.integers())
def test_seeds(seed: int) -> None:
    if 0 <= seed < 2**63:
        assert check(replace(BASE, seed=seed), DISTILLED, GPU).seed == seed
    else:
        assert f"seed is {seed}" in refusal(seed=seed)


@given(steps=NUMBERS)
def test_a_distilled_model_has_its_own_number_of_steps(steps: int) -> None:
    if steps == 4:
        assert check(replace(BASE, steps=4), DISTILLED, GPU).steps == 4
        return
    message = refusal(steps=steps)
    assert f"steps is {steps}" in message
    if 1 <= steps <= 1000:
        assert "--accept-nonstandard" in message and "4" in message
        assert check(replace(BASE, steps=steps, accept_nonstandard=True), DISTILLED, GPU).steps == steps
        assert check(replace(BASE, steps=steps), undistilled(), GPU).steps == steps
    else:
        refusal(steps=steps, accept_nonstandard=True)


@pytest.mark.parametrize("guidance", [0.0, 5.0, -1.0, float("nan"), float("inf")])
def test_guidance_is_refused_with_the_reason(guidance: float) -> None:
    message = refusal(guidance=guidance)
    assert "distilled" in message and "leave it out" in message


def test_the_models_own_guidance_passes() -> None:
    assert check(replace(BASE, guidance=1.0), DISTILLED, GPU) == check(BASE, DISTILLED, GPU)


def test_a_negative_prompt_is_refused_with_the_reason() -> None:
    assert "no effect" in refusal(negative_prompt="blurry")
    assert check(replace(BASE, negative_prompt=""), DISTILLED, GPU).prompt == BASE.prompt


@pytest.mark.parametrize(
    ("field", "value"),
    [("sampler", "unipc"), ("noise_device", "mps"), ("fps", 0), ("fps", 121), ("fps", -16)],
)
def test_other_fields_name_the_value_and_what_was_expected(field: str, value: Any) -> None:
    message = refusal(**{field: value})
    assert str(value) in message and "expected" in message


def test_guidance_of_a_model_that_is_not_distilled() -> None:
    plain = undistilled()
    assert check(BASE, plain, GPU).guidance == plain.sampling.guidance
    checked = check(replace(BASE, guidance=5.0, negative_prompt="blur"), plain, GPU)
    assert (checked.guidance, checked.negative_prompt) == (5.0, "blur")
    with pytest.raises(RequestError, match="no effect"):
        check(replace(BASE, guidance=1.0, negative_prompt="blur"), plain, GPU)
    for bad in (-1.0, 101.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="guidance is"):
            check(replace(BASE, guidance=bad), plain, GPU)
