"""LightX2V's JSON: every key translated, refused or named; `t2v explain` and `generate --config`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entrypoint.cli import cli
from runtime.errors import FourstepError, RequestError
from runtime.lightx2v.config import (
    MAX_BYTES,
    changed_profile,
    default_sampling,
    parse,
    read,
    shown,
    shown_key,
    translate,
)
from runtime.lightx2v.keys import KEYS
from runtime.lightx2v.rules import even_steps, published_names, scheme_quantization
from runtime.profiles import list_manifests, load_profile
from runtime.sampler import schedule
from runtime.video import read_frames, read_metadata
from tests.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = default_sampling()
FP8 = {
    "infer_steps": 4,
    "target_video_length": 81,
    "text_len": 512,
    "target_height": 480,
    "target_width": 832,
    "self_attn_1_type": "flash_attn3",
    "cross_attn_1_type": "flash_attn3",
    "sample_guide_scale": 6,
    "sample_shift": 5,
    "enable_cfg": False,
    "cpu_offload": False,
    "offload_granularity": "model",
    "denoising_step_list": [1000, 750, 500, 250],
    "dit_quantized": True,
    "dit_quant_scheme": "fp8-sgl",
}
"""What LightX2V ships as wan_t2v_distill_fp8_4step_cfg.json, without the path of the weights."""

PLACEHOLDER = "lightx2v/Wan2.1-Distill-Models/wan2.1_t2v_14b_scaled_fp8_e4m3_lightx2v_4step.safetensors"
SMALL = {"target_height": 32, "target_width": 48, "target_video_length": 5}


def of(**config: Any) -> Any:
    return translate(config, SAMPLING)


def fate(**config: Any) -> str:
    """The status of the first key."""
    status: str = of(**config).entries[0].status
    return status


def write(config: Any, name: str = "config.json") -> Path:
    path = Path(name)
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


# ------------------------------------------------------------------------------------------ what keys become


def test_the_shipped_fp8_configuration() -> None:
    translation = translate(FP8, SAMPLING)
    assert not translation.faults()
    assert translation.options == {
        "frames": 81,
        "height": 480,
        "width": 832,
        "steps": 4,
        "model": "wan2.1-t2v-14b-4step-fp8",
        "sampler": "euler",
        "noise_device": "cuda",
    }
    assert translation.profile == {"quantization": "fp8"} and not translation.wishes()
    assert translation.command() == (
        "t2v --frames 81 --height 480 --width 832 --steps 4 --model wan2.1-t2v-14b-4step-fp8 "
        "--sampler euler --noise-device cuda"
    )


def test_the_recipe_for_12_gigabytes() -> None:
    changes = {"cpu_offload": True, "offload_granularity": "block"}
    changes |= {"t5_cpu_offload": True, "vae_cpu_offload": False}
    translation = translate(FP8 | changes, SAMPLING)
    assert not translation.faults()
    assert translation.profile == {"text_encoder.stay_on_gpu": False, "quantization": "fp8"}
    assert not translation.wishes()  # the plan streams what does not fit, whoever asks


def test_offloading_spreads_to_what_does_not_say_otherwise() -> None:
    assert of(cpu_offload=True).profile == {"text_encoder.stay_on_gpu": False, "vae.stay_on_gpu": False}
    assert of(cpu_offload=True, vae_cpu_offload=False).profile == {"text_encoder.stay_on_gpu": False}
    assert of(cpu_offload=False, t5_cpu_offload=False, vae_cpu_offload=False).profile == {}


@pytest.mark.parametrize(
    ("scheme", "quantization"),
    [
        *((f"fp8-{backend}", "fp8") for backend in ("sgl", "vllm", "torchao", "triton", "q8f")),
        *((f"int8-{backend}", "int8") for backend in ("sgl", "vllm", "torchao", "triton", "q8f")),
        ("fp8", "fp8"),
        ("int8", "int8"),
        ("W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm", "fp8"),
        ("W-int8-channel-sym-A-int8-channel-sym-dynamic-Vllm", "int8"),
        *(
            (name, None)
            for name in ("fp8-pertensor", "fp8-b128-deepgemm", "nvfp4", "gguf-Q4_K_M", "int8-npu")
        ),
        *(
            (name, None)
            for name in ("", "-", "Default", "fp16", "W-fp8-channel-sym-A-int8-channel-sym-dynamic")
        ),
    ],
)
def test_quantization_schemes(scheme: str, quantization: str | None) -> None:
    assert scheme_quantization(scheme) == quantization
    translation = of(dit_quant_scheme=scheme, dit_quantized=True)
    if quantization is None:
        assert "dit_quant_scheme" in [entry.key for entry in translation.faults()] or scheme == ""
    else:
        assert translation.options["model"] == f"wan2.1-t2v-14b-4step-{quantization}"
        assert translation.options["model"] in list_manifests()
    assert fate(dit_quant_scheme=scheme) == "moot"  # without dit_quantized


def test_where_the_weights_are() -> None:
    scheme = {"dit_quantized": True, "dit_quant_scheme": "int8-vllm"}
    assert of(model_path="./w", **scheme).options["model"] == "./w"
    assert of(model_path="./w", **scheme).profile == {"quantization": "int8"}
    assert of(dit_quantized_ckpt="w/distill_int8", **scheme).options["model"] == "./w/distill_int8"
    assert of(dit_quantized_ckpt="/w/x.safetensors", **scheme).options["model"] == "/w"
    assert not of(model_path="/w", dit_quantized_ckpt="/w/distill_int8", **scheme).faults()
    assert of(model_path="/v", dit_quantized_ckpt="/w/distill_int8", **scheme).faults()
    assert of(dit_quantized_ckpt="/w/x.safetensors").options.get("model") is None  # not quantized: unused
    assert fate(dit_quantized_ckpt="/w/wan2.1_i2v_480p_int8.safetensors", **scheme) == "refused"
    assert fate(vae_path="/w/Wan2.1_VAE.pth", model_path="/w") == "used"
    assert fate(vae_path="/elsewhere/Wan2.1_VAE.pth", model_path="/w") == "refused"


def test_a_path_that_only_names_a_published_file() -> None:
    scheme = {"dit_quantized": True, "dit_quant_scheme": "fp8-sgl"}
    model = of(dit_quantized_ckpt=PLACEHOLDER, **scheme).options["model"]
    assert model == published_names()[PLACEHOLDER.rpartition("/")[2]] and model in list_manifests()
    contrary = {"dit_quantized": True, "dit_quant_scheme": "int8-sgl"}
    assert of(dit_quantized_ckpt=PLACEHOLDER, **contrary).faults()
    assert fate(dit_quantized_ckpt="lightx2v/Some-Repo/some.safetensors", **scheme) == "refused"


def test_steps_are_those_of_the_list() -> None:
    assert fate(denoising_step_list=[1000, 750, 500, 250]) == "used"
    assert fate(denoising_step_list=[1000, 500]) == "nonstandard"
    assert of(denoising_step_list=[1000, 500]).options["steps"] == 2
    assert fate(denoising_step_list=[1000, 900, 500, 250]) == "refused"
    assert fate(denoising_step_list=[]) == "refused"
    moot = of(infer_steps=50)
    assert moot.entries[0].status == "moot" and moot.wishes() and "steps" not in moot.options


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 40])
def test_the_list_of_this_engines_schedule(steps: int) -> None:
    levels = [1 - k / 1000 for k in range(1000)]
    chosen = [levels[1000 - entry] for entry in even_steps(steps)]
    shifted = [5 * level / (1 + 4 * level) for level in chosen]
    assert torch.allclose(torch.tensor(shifted), torch.tensor(schedule(steps, 5.0)[:-1]), atol=1e-6)


def test_guidance_is_off_or_refused() -> None:
    assert not of(enable_cfg=False, sample_guide_scale=6).faults()
    faults = of(enable_cfg=True, sample_guide_scale=6).faults()
    assert [entry.key for entry in faults] == ["enable_cfg"] and "guidance" not in of(enable_cfg=True).options
    plain = SAMPLING.model_copy(update={"distilled": False, "guidance": 5.0, "steps": 50})
    options = translate({"enable_cfg": True, "sample_guide_scale": 6, "infer_steps": 40}, plain).options
    assert options == {"guidance": 6, "steps": 40}


@pytest.mark.parametrize(
    "config",
    [
        *({"model_cls": name} for name in ("wan2.2_moe_distill", "hunyuan_video_1.5", "")),
        *({"task": name} for name in ("i2v", "T2V")),
        *({"sample_shift": 8}, {"text_len": 256}, {"vae_stride": [4, 16, 16]}, {"patch_size": [1, 1, 1]}),
        *({"use_tae": True}, {"use_lightvae": True}, {"changing_resolution": True}, {"dummy_model": True}),
        *({"enable_dynamic_cfg": True}, {"weight_auto_quant": True}, {"use_prompt_enhancer": True}),
        {"lora_configs": [{"path": "x.safetensors", "strength": 1.0}]},
        {"video_frame_interpolation": {"algo": "rife", "target_fps": 24}},
        *({"scheduler_type": "WanScheduler"}, {"image_path": "cat.png"}, {"vae_dtype": "int4"}),
        *({"target_height": "480"}, {"target_height": 480.0}, {"target_height": True}, {"enable_cfg": 0}),
        *(
            {"size": [480]},
            {"model_path": ""},
            {"model_path": "a\0b"},
            {"prompt": "\ud800"},
            {"lazy_load": 1},
        ),
        *({"target_height": 480, "size": [720, 1280]}, {"dit_quantized": True}),
    ],
    ids=lambda config: shown(config),
)
def test_what_would_be_another_picture_is_refused(config: dict[str, Any]) -> None:
    faults = translate(config, SAMPLING).faults(accept_nonstandard=True)
    assert len(faults) == 1
    with pytest.raises(RequestError, match=faults[0].key):
        translate(config, SAMPLING).refuse("x.json")


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_what_is_off_is_not_refused(value: Any) -> None:
    for key in ("lora_configs", "video_super_resolution", "use_tae", "parallel", "image_path"):
        if value is None or KEYS[key].wanted.fits(value):
            assert not translate({key: value}, SAMPLING).faults(), key


def test_what_only_costs_time_is_told() -> None:
    config = {
        "feature_caching": "Tea",
        "parallel": {"seq_p_size": 4},
    }
    planned = {"use_tiling_vae": True, "lazy_load": True}
    translation = translate(config | planned, SAMPLING)
    assert not translation.faults() and [entry.key for entry in translation.wishes()] == list(config)
    quiet = {"feature_caching": "NoCaching", "parallel": {"seq_p_size": 1}, "use_tiling_vae": False}
    assert not translate(quiet, SAMPLING).wishes()


def test_newer_names_of_the_size() -> None:
    options = of(size=[720, 1280], num_frames=49, distill_method="dmd2").options
    assert (options["height"], options["width"], options["frames"]) == (720, 1280, 49)


def test_the_dtype_of_the_decode() -> None:
    for name, dtype in (("FP32", "fp32"), ("torch.bfloat16", "bf16"), ("float16", "fp16")):
        assert of(vae_dtype=name).profile == {"vae.dtype": dtype}


def test_unknown_keys_are_named_with_their_neighbours() -> None:
    translation = of(target_heigth=480, zzz=1)
    with pytest.raises(RequestError, match=r"target_heigth \(did you mean target_height.*zzz .*accept"):
        translation.refuse("x.json")
    translation.refuse("x.json", accept_nonstandard=True)


# ------------------------------------------------------------------------------------------------ any JSON


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1"),
        ("{", "line 1"),
        ('{"a": 1,}', "line 1"),
        ('{"a": 1, "a": 2}', "the key a stands there twice"),
        ('{"parallel": {"x": 1, "x": 2}}', "the key x stands there twice"),
        ('{"fps": NaN}', "NaN is no number"),
        ('{"fps": -Infinity}', "Infinity is no number"),
        ('{"warmup": 1e999}', "1e999 is too large"),
        ("[]", "expected an object"),
        ("3", "expected an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested more than"),
        ('{"fps": ' + "9" * 5000 + "}", "limit"),
        (json.dumps({f"k{i}": i for i in range(400)}), "400 keys"),
    ],
    ids=lambda text: text[:20],
)
def test_files_that_are_no_configuration(text: str, told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        parse(text, "x.json")
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large, latin = tmp_path / "large.json", tmp_path / "latin.json"
    large.write_bytes(b" " * (MAX_BYTES + 1))
    latin.write_bytes(b'{"prompt": "\xe9"}')
    for path in (tmp_path, tmp_path / "none.json", Path("a\0b"), large, latin):
        with pytest.raises(RequestError):
            read(path)
    marked = tmp_path / "marked.json"
    marked.write_bytes(b'\xef\xbb\xbf{"seed": 7}')
    assert read(marked) == {"seed": 7}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    # Half surrogates are JSON too, and words that mean something reach further into the rules.
    | st.sampled_from(["\ud800", "fp8-sgl", "wan2.1", "t2v", "/w/x.pt", "lightx2v/a", 1000, [1000, 500]]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=80)
@given(st.dictionaries(st.sampled_from(sorted(KEYS)) | st.text(max_size=12), VALUES, max_size=12))
@example({"mm_config": {"mm_type": 3}, "dit_quantized": True})
@example({"mm_config": False})
@example({"(its noise)": None, "infer_steps": 10**30})
@example({"denoising_step_list": [2**62] * 1000, "infer_steps": 1})
def test_any_object_is_translated(config: dict[str, Any]) -> None:
    translation = translate(config, SAMPLING)
    keys = [entry.key for entry in translation.entries if not entry.implied]
    assert keys == list(config)
    translation.command().encode()
    for entry in translation.entries:
        entry.sentence().encode()
        if entry.outcome.options:
            assert set(entry.outcome.options) <= {p.name for p in cli.commands["generate"].params}
        if entry.status == "used" and entry.outcome.profile:
            changed_profile(load_profile("cpu"), entry.outcome.profile)
    try:
        translation.refuse("x.json")
    except RequestError as error:
        assert str(error).isprintable()


@settings(max_examples=80)
@given(st.text(alphabet='{}[]":,0123456789.eE-ntrufalse \\\n', max_size=60) | VALUES.map(json.dumps))
def test_any_text_is_an_object_or_a_sentence(text: str) -> None:
    try:
        assert isinstance(parse(text, "x.json"), dict)
    except FourstepError as error:
        assert str(error).startswith("x.json: ") and str(error).isprintable()


def test_what_is_shown_is_short_and_printable() -> None:
    assert shown("\ud800\x1b[31m\u202e").isprintable() and shown_key("a\x1bb").isprintable()
    assert len(shown(list(range(1000)))) <= 60 and shown_key("fps") == "fps"


# ----------------------------------------------------------------------------------------------- the profile


def test_a_changed_profile() -> None:
    profile = load_profile("rtx4090")
    changed = changed_profile(profile, {"vae.stay_on_gpu": False, "vae.dtype": "fp32"})
    assert profile.vae.stay_on_gpu and not changed.vae.stay_on_gpu and changed.vae.dtype == "fp32"
    with pytest.raises(RequestError, match=r"rtx3090.*fp8"):
        changed_profile(load_profile("rtx3090"), {"quantization": "fp8"})


# ------------------------------------------------------------------------------------------ the command line


def test_explain_prints_a_table_and_a_command(t2v: Run) -> None:
    result = t2v("explain", write(FP8 | {"t5_cpu_offload": True}))
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["KEY", "VALUE", "HERE", "WHY"]
    assert lines[1 : 1 + len(FP8)] == [line for line in lines if line.split(" ")[0] in FP8]
    assert len({line.index(line.split()[1]) for line in lines[1:6]}) == 1  # aligned
    assert "--height 480" in lines[4] and result.stderr == ""
    assert lines[-2] == translate(FP8, SAMPLING).command()
    assert "text_encoder.stay_on_gpu: false" in lines[-1]


def test_explain_in_json(t2v: Run) -> None:
    events = [json.loads(line) for line in t2v("explain", write(FP8), "--json").stdout.splitlines()]
    assert [event["key"] for event in events if event["event"] == "key"][: len(FP8)] == list(FP8)
    assert events[-1]["event"] == "translation" and events[-1]["options"]["height"] == 480


def test_explain_fails_where_generate_would(t2v: Run) -> None:
    for config in ({"use_tae": True}, {"targt_width": 8}, {"target_height": 470}, "[]", '{"fps": NaN}'):
        shows, makes = t2v("explain", write(config)), t2v("--config", write(config), "--model", "demo")
        assert shows.exit_code == makes.exit_code == 2
        assert shows.stderr.startswith("t2v: error: config.json: ")
    assert t2v("explain", "none.json").exit_code == 2
    error = json.loads(t2v("explain", write({"use_tae": True}), "--json").stdout.splitlines()[-1])
    assert error["event"] == "error" and error["code"] == 2


def test_a_video_from_a_configuration(t2v: Run, tiny_checkpoint: Path) -> None:
    path = write(FP8 | SMALL | {"model_path": str(tiny_checkpoint), "fps": 8, "cpu_offload": True, "seed": 7})
    result = t2v("--config", path, "--device", "cpu", "--output", "a.mp4", "--width", 64)
    assert result.exit_code == 0, result.stderr
    assert "cpu_offload" not in result.stderr and "`t2v explain`" in result.stderr  # the plan does it unasked
    assert read_frames("a.mp4").shape == (5, 32, 64, 3)  # what is typed wins
    record = read_metadata("a.mp4")
    assert (record["sampler"], record["seed"], record["fps"]) == ("euler", 7, 8)
    assert (record["quantization"], record["profile"], record["noise_device"]) == ("fp8", "cpu", "cpu")


def test_a_configuration_beats_the_environment(t2v: Run, tiny_checkpoint: Path) -> None:
    path = write(SMALL | {"prompt": "A red fox"})
    result = t2v(
        *("--config", path, "--model", tiny_checkpoint, "--device", "cpu", "--output", "a.mp4"),
        *("--sampler", "lcm", "--json"),
        env={"T2V_HEIGHT": "64", "T2V_PROMPT": "snow"},
    )
    assert result.exit_code == 0 and result.stderr == ""
    record = read_metadata("a.mp4")
    assert (record["height"], record["prompt"], record["sampler"]) == (32, "A red fox", "lcm")


def test_weights_of_another_format_than_the_configuration_says(t2v: Run, tiny_checkpoint: Path) -> None:
    path = write(FP8 | SMALL)
    result = t2v("--config", path, "--model", tiny_checkpoint / "distill_int8", "--device", "cpu")
    assert result.exit_code == 3 and "holds int8" in result.stderr and "expected fp8" in result.stderr


def test_unknown_keys_can_be_ignored(t2v: Run, tiny_checkpoint: Path) -> None:
    path = write(SMALL | {"brand_new_key": 1, "denoising_step_list": [1000, 500]})
    arguments = ("--config", path, "--model", tiny_checkpoint, "--device", "cpu", "--output", "a.mp4")
    assert t2v(*arguments).exit_code == 2
    result = t2v(*arguments, "--accept-nonstandard")
    assert result.exit_code == 0 and "brand_new_key" in result.stderr
    assert read_metadata("a.mp4")["steps"] == 2


def test_explaining_needs_no_torch() -> None:
    code = "import entrypoint.cli, runtime.lightx2v.config, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" not in found.stdout.split() and "av" not in found.stdout.split()
    code = "import entrypoint.cli, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"pydantic", "rich", "numpy"} & set(found.stdout.split())
