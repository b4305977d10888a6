"""LightX2V's Python interface: the recipes' scripts run; what has no meaning is told once, or refused."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime import Pipeline
from runtime.errors import OutputError, RequestError, WeightsError
from runtime.lightx2v import LightX2VPipeline, LightX2VWarning
from runtime.video import read_frames, read_metadata
from tests.tiny import SMALL

GUITAR = "A man with short gray hair plays a red electric guitar."
SIZE = {"height": SMALL["height"], "width": SMALL["width"], "num_frames": SMALL["frames"]}
GOOD: dict[str, Any] = {"infer_steps": 4, "guidance_scale": 1.0, **SIZE}

Made = Callable[..., LightX2VPipeline]


@pytest.fixture
def pipeline(workplace: Path, tiny_checkpoint: Path) -> Made:
    """A LightX2VPipeline of the tiny checkpoint's fp8 variant, or with other parameters."""

    def make(**given: Any) -> LightX2VPipeline:
        defaults = {"model_path": str(tiny_checkpoint / "distill_fp8"), "task": "t2v", "device": "cpu"}
        return LightX2VPipeline(**(defaults | {"model_cls": "wan2.1_distill"} | given))

    return make


def told(record: list[warnings.WarningMessage] | Any) -> list[str]:
    return [str(one.message) for one in record if one.category is LightX2VWarning]


def test_methods_parameters_and_defaults_are_those_of_lightx2v() -> None:
    defaults = {
        "enable_offload": "False 'block' False False False",
        "enable_quantize": "False False False None None None False False 'fp8-sgl' None",
        "enable_cache": "'Tea' () 0.15 False False 6 0.24 0.2 ()",
        "enable_lightvae": "False False None None",
        "enable_parallel": "1 1 'ulysses'",
        "create_generator": "'flash_attn2' 50 81 480 832 5.0 5.0 16 '16:9' 0.9 2 (1000, 750, 500, 250) None",
        "generate": "42 '' '' 'lightx2v_gen_result.png' None None None None",
    }
    for name, expected in defaults.items():
        parameters = list(inspect.signature(getattr(LightX2VPipeline, name)).parameters.values())[1:]
        assert " ".join(repr(one.default) for one in parameters).startswith(expected), name
    init = list(inspect.signature(LightX2VPipeline).parameters)
    assert init[:4] == ["task", "model_path", "model_cls", "support_tasks"]


@pytest.mark.parametrize("model_cls", ["wan2.1", "wan2.1_distill"])
def test_the_recipes_script(model_cls: str, workplace: Path, tiny_checkpoint: Path) -> None:
    """The calls of the published recipes for the RTX 4070 and 4080 SUPER; only the size is smaller."""
    (workplace / "weights").symlink_to(tiny_checkpoint)
    with pytest.warns(LightX2VWarning) as record:
        pipe = LightX2VPipeline(model_path="./weights/distill_fp8", model_cls=model_cls, task="t2v")
        pipe.enable_offload(
            cpu_offload=True,
            offload_granularity="block",
            text_encoder_offload=True,
            image_encoder_offload=False,
            vae_offload=False,
        )
        pipe.create_generator(
            attn_mode="sage_attn2",
            infer_steps=4,
            height=SIZE["height"],
            width=SIZE["width"],
            num_frames=SIZE["num_frames"],
            guidance_scale=1.0,
            sample_shift=5.0,
        )
        result = pipe.generate(seed=42, prompt=GUITAR, save_result_path="./output.mp4")
        pipe.generate(seed=42, prompt=GUITAR, save_result_path="./output.mp4")  # as a script run twice
    assert result == {"video": None}
    assert read_frames("output.mp4").shape == (5, 32, 48, 3)
    record_of = read_metadata("output.mp4")
    assert (record_of["sampler"], record_of["steps"], record_of["quantization"]) == ("euler", 4, "fp8")
    assert [message.split()[0] for message in told(record)] == ["cpu_offload", "attn_mode"]
    assert {one.filename for one in record} == {__file__}  # at the script's own line


def test_the_picture_is_that_of_the_euler_rule(pipeline: Made, tiny_checkpoint: Path) -> None:
    theirs = pipeline()
    theirs.create_generator(**GOOD)
    tensor = theirs.generate(prompt=GUITAR, return_result_tensor=True)["video"]
    ours = Pipeline.load(model=tiny_checkpoint / "distill_fp8", device="cpu")
    sizes = {"height": 32, "width": 48, "num_frames": 5}
    assert tensor is not None and tensor.dtype == torch.float32 and tensor.shape == (5, 32, 48, 3)
    assert tensor.min() >= 0 and tensor.max() <= 1 and tensor.std() > 0.01
    levels = (tensor * 255).round().numpy().astype(np.uint8)
    assert np.array_equal(levels, ours(GUITAR, seed=42, sampler="euler", **sizes).frames)
    assert not np.array_equal(levels, ours(GUITAR, seed=42, sampler="lcm", **sizes).frames)
    lcm = pipeline(sampler="lcm")
    lcm.create_generator(**GOOD)
    again = lcm.generate(prompt=GUITAR, return_result_tensor=True)["video"]
    assert again is not None and not torch.equal(again, tensor)


def test_nothing_is_written_with_a_tensor(pipeline: Made, workplace: Path) -> None:
    pipe = pipeline()
    pipe.create_generator(**GOOD)
    pipe.generate(prompt="fox", return_result_tensor=True, save_result_path="a.mp4")
    assert not list(workplace.iterdir())


@pytest.mark.filterwarnings("ignore::runtime.lightx2v.pipeline.LightX2VWarning")
def test_each_request_may_have_its_own_size(pipeline: Made) -> None:
    pipe = pipeline()
    pipe.create_generator(**GOOD)
    other = pipe.generate(prompt="fox", return_result_tensor=True, target_shape=[48, 32], num_frames=1)[
        "video"
    ]
    assert other is not None and other.shape == (1, 48, 32, 3)
    with pytest.raises(RequestError, match="frames is 6"):
        pipe.generate(prompt="fox", num_frames=6)
    with pytest.raises(RequestError, match="target_shape"):
        pipe.generate(prompt="fox", target_shape=[48])


def test_the_default_name_becomes_an_mp4(pipeline: Made, workplace: Path) -> None:
    pipe = pipeline()
    pipe.create_generator(**GOOD)
    with pytest.warns(LightX2VWarning, match=r"lightx2v_gen_result\.mp4"):
        pipe.generate(prompt="fox")
    assert [path.name for path in workplace.iterdir()] == ["lightx2v_gen_result.mp4"]
    (workplace / "taken.mp4").mkdir()
    with pytest.raises(OutputError):
        pipe.generate(prompt="fox", save_result_path="taken.mp4")


def test_defaults_that_would_spoil_the_picture_are_told_once(pipeline: Made) -> None:
    pipe = pipeline()
    with pytest.warns(LightX2VWarning) as record:
        pipe.create_generator(**SIZE)
        pipe.create_generator(**SIZE)
        for _ in range(2):
            pipe.generate(prompt="fox", negative_prompt="blurry", return_result_tensor=True)
    starts = [message.split()[0] for message in told(record)]
    assert sorted(starts) == ["guidance_scale", "infer_steps", "negative_prompt"]
    assert "5" in next(message for message in told(record) if message.startswith("guidance_scale"))


@pytest.mark.parametrize("scale", [0.0, 3.5, 6])
def test_a_guidance_that_was_asked_for_is_refused(pipeline: Made, scale: float) -> None:
    with pytest.raises(RequestError, match=f"guidance_scale is {scale}: expected 1.0"):
        pipeline().create_generator(**(GOOD | {"guidance_scale": scale}))


def test_steps_follow_the_list(pipeline: Made) -> None:
    with pytest.raises(RequestError, match=r"denoising_step_list.*accept_nonstandard"):
        pipeline().create_generator(**GOOD, denoising_step_list=[1000, 500])
    pipe = pipeline(accept_nonstandard=True)
    with pytest.warns(LightX2VWarning, match=r"infer_steps is 4.*2 steps"):
        pipe.create_generator(**GOOD, denoising_step_list=[1000, 500])
    pipe.generate(prompt="fox", save_result_path="a.mp4")
    assert read_metadata("a.mp4")["steps"] == 2


@pytest.mark.parametrize(
    "wrong",
    [{"task": "i2v"}, {"model_cls": "wan2.2_moe_distill"}, {"model_path": ""}, {"model_path": "./none"}],
)
def test_other_models_are_refused_at_once(pipeline: Made, wrong: dict[str, str]) -> None:
    with pytest.raises(RequestError):
        pipeline(**wrong)


def test_features_that_would_draw_another_picture_are_refused(pipeline: Made) -> None:
    with pytest.raises(RequestError, match="LoRA is not supported yet"):
        pipeline().enable_lora([{"path": "x.safetensors", "strength": 1.0}])
    with pytest.raises(RequestError, match="use_tae"):
        pipeline().enable_lightvae(use_tae=True, tae_path="taew2_1.pth")
    with pytest.raises(RequestError, match="sample_shift is 8"):
        pipeline().create_generator(**GOOD, sample_shift=8.0)
    with pytest.raises(RequestError, match='height is "32"'):
        pipeline().create_generator(**(GOOD | {"height": "32"}))
    pipe = pipeline()
    with pytest.raises(RequestError, match="create_generator"):
        pipe.generate(prompt="fox")
    pipe.create_generator(**GOOD)
    for inputs in ({"image_path": "cat.png"}, {"task": "i2v"}):
        with pytest.raises(RequestError, match=next(iter(inputs))):
            pipe.generate(prompt="fox", **inputs)
    with pytest.raises(RequestError, match="prompt is empty"):
        pipe.generate(save_result_path="a.mp4")


def test_features_that_only_save_time_are_told(pipeline: Made) -> None:
    pipe = pipeline()
    with pytest.warns(LightX2VWarning) as record:
        pipe.enable_cache(cache_method="Tea", teacache_thresh=0.26)
        pipe.enable_parallel(seq_p_size=4)
        pipe.enable_compile()
        pipe.create_generator(**GOOD)
        pipe.enable_offload(cpu_offload=True)
    assert sorted(message.split()[0] for message in told(record)) == [
        *("cache_method", "compile", "enable_offload()", "parallel")
    ]


def test_calls_without_a_wish_are_silent(pipeline: Made) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LightX2VWarning)
        pipe = pipeline()
        pipe.enable_offload()
        pipe.enable_quantize()
        pipe.enable_lightvae()
        pipe.enable_parallel()
        pipe.create_generator(**GOOD)
        pipe.generate(prompt="fox", return_result_tensor=True)


@pytest.mark.parametrize(("scheme", "variant"), [("fp8-sgl", "fp8"), ("int8-vllm", "int8")])
def test_quantization_chooses_the_variant(
    pipeline: Made, tiny_checkpoint: Path, scheme: str, variant: str
) -> None:
    pipe = pipeline(model_path=str(tiny_checkpoint))
    pipe.enable_quantize(dit_quantized=True, quant_scheme=scheme)
    pipe.create_generator(**GOOD)
    pipe.generate(prompt="fox", save_result_path="a.mp4")
    assert read_metadata("a.mp4")["quantization"] == variant


def test_a_scheme_that_the_files_contradict(pipeline: Made) -> None:
    pipe = pipeline()
    pipe.enable_quantize(dit_quantized=True, quant_scheme="int8-q8f")
    with pytest.raises(WeightsError, match="holds fp8"):
        pipe.create_generator(**GOOD)


def test_offloading_changes_a_copy_of_the_profile(pipeline: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(profile="rtx4090")
    pipe.enable_offload(text_encoder_offload=True, vae_offload=True)
    pipe.create_generator(**GOOD)
    assert pipe._pipe is not None
    profile = pipe._pipe.profile
    assert profile.name == "rtx4090" and not profile.vae.stay_on_gpu and not profile.text_encoder.stay_on_gpu


def test_a_configuration_file_says_everything(pipeline: Made, workplace: Path) -> None:
    (workplace / "c.json").write_text('{"target_height": 32, "target_width": 64, "target_video_length": 1}')
    pipe = pipeline()
    pipe.create_generator(config_json="c.json", height=4800)
    video = pipe.generate(prompt="fox", return_result_tensor=True)["video"]
    assert video is not None and video.shape == (1, 32, 64, 3)


def test_unknown_parameters_are_named_with_their_neighbours(pipeline: Made) -> None:
    with pytest.raises(TypeError, match=r"create_generator\(\) .*'infer_step'.*infer_steps"):
        pipeline().create_generator(infer_step=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"model_pth.*model_path"):
        LightX2VPipeline(model_pth="x")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="expected one of cpu_offload"):
        pipeline().enable_offload(zzz=1)  # type: ignore[call-arg]
