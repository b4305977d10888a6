"""LightX2V's Python interface on this engine: its scripts run with one line changed.

    from runtime.lightx2v import LightX2VPipeline        # was: from lightx2v import LightX2VPipeline

Methods, parameters and defaults are LightX2V's as of August 2026. What a call asks for is kept under
LightX2V's own keys and translated by the table that `t2v explain` prints (`runtime.lightx2v.config`): a
parameter is used, or has no effect here and is told of once (`LightX2VWarning`), or, where LightX2V would
make another picture, refused (`RequestError`).

The picture is LightX2V's of today, as far as another engine can make it: the `euler` rule, which is what its
scheduler computes since November 2025 (the model card, and this program's own default, say `lcm`), and noise
drawn on the GPU. Both can be overridden: `LightX2VPipeline(..., sampler="lcm", noise_device="cpu")`.
"""

import difflib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from runtime.checkpoint import expect_quantization, find_component, open_checkpoint
from runtime.device import select_device
from runtime.errors import RequestError
from runtime.lightx2v.config import Translation, changed_profile, read, shown, translate
from runtime.lightx2v.keys import KEYS
from runtime.pipeline import Pipeline
from runtime.profiles import find_model, list_manifests, load_profile, manifest_of
from runtime.schema import Profile, Quantization
from runtime.video import Video, check_output

DEFAULT_GUIDANCE = 5.0
"""LightX2V's default, which leaves guidance on even for a distilled model."""

RENAMED = {
    "text_encoder_offload": "t5_cpu_offload",
    "image_encoder_offload": "clip_cpu_offload",
    "vae_offload": "vae_cpu_offload",
    "text_encoder_quantized": "t5_quantized",
    "text_encoder_quantized_ckpt": "t5_quantized_ckpt",
    "image_encoder_quantized": "clip_quantized",
    "image_encoder_quantized_ckpt": "clip_quantized_ckpt",
    "quant_scheme": "dit_quant_scheme",
    "cache_method": "feature_caching",
    "attn_mode": "self_attn_1_type",
    "num_frames": "target_video_length",
    "height": "target_height",
    "width": "target_width",
    "guidance_scale": "sample_guide_scale",
}
"""Parameters whose key in a configuration has another name; those not listed have the same."""

NO_KEYS = ("self", "profile", "device", "sampler", "noise_device", "accept_nonstandard", "config_json")
"""Names among a method's parameters that are none of a configuration's keys."""

Method = TypeVar("Method", bound=Callable[..., Any])


class LightX2VWarning(UserWarning):
    """A parameter of LightX2V's that has no effect here, or another one than its default suggests."""


def _like_lightx2v(method: Method) -> Method:
    """Refuse a keyword that the method has not, naming those that come near it."""
    names = list(inspect.signature(method).parameters)[1:]

    @wraps(method)
    def checked(self: "LightX2VPipeline", *args: Any, **given: Any) -> Any:
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
                hint = (
                    f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}."
                )
                raise TypeError(f"{method.__name__}() has no parameter {name!r}; {hint}")
        return method(self, *args, **given)

    return cast(Method, checked)


class LightX2VPipeline:
    """LightX2V's pipeline: `enable_...`, then `create_generator`, which loads the model, then `generate`."""

    @_like_lightx2v
    def __init__(
        self,
        task: str = "",
        model_path: str = "",
        model_cls: str = "",
        support_tasks: Sequence[str] = (),
        sf_model_path: str | None = None,
        dit_original_ckpt: str | None = None,
        low_noise_original_ckpt: str | None = None,
        high_noise_original_ckpt: str | None = None,
        transformer_model_name: str | None = None,
        *,
        profile: str | Path = "auto",
        device: str = "auto",
        sampler: str = "euler",
        noise_device: str = "auto",
        accept_nonstandard: bool = False,
    ) -> None:
        """`model_path`: a variant directory, the directory around several (the card's profile picks one), or
        a name of `t2v models`. The parameters after the star are this program's own.

        Raises RequestError for another task or family than Wan2.1 text to video.
        """
        self._profile, self._device = profile, device
        self._sampler, self._noise_device = sampler, noise_device
        self._accept_nonstandard = accept_nonstandard
        self._config: dict[str, Any] = {}
        self._by_default: set[str] = set()  # keys whose parameter has its default
        self._names: dict[str, str] = {}  # key -> parameter
        self._told: set[str] = set()
        self._options: Mapping[str, Any] = {}
        self._pipe: Pipeline | None = None
        if not model_path:
            raise RequestError("model_path is empty; name the directory of the model's weights.")
        self._take("__init__", locals())
        self._translate()  # a wrong task is told here, not after the other calls

    # ------------------------------------------------------------------------------------- before the model

    @_like_lightx2v
    def enable_offload(
        self,
        cpu_offload: bool = False,
        offload_granularity: str = "block",
        text_encoder_offload: bool = False,
        image_encoder_offload: bool = False,
        vae_offload: bool = False,
    ) -> None:
        """Text encoder and VAE rest in RAM and visit the GPU; `cpu_offload` of the transformer is to come."""
        self._take("enable_offload", locals())

    @_like_lightx2v
    def enable_quantize(
        self,
        dit_quantized: bool = False,
        text_encoder_quantized: bool = False,
        image_encoder_quantized: bool = False,
        dit_quantized_ckpt: str | None = None,
        low_noise_quantized_ckpt: str | None = None,
        high_noise_quantized_ckpt: str | None = None,
        text_encoder_quantized_ckpt: str | bool | None = False,
        image_encoder_quantized_ckpt: str | bool | None = False,
        quant_scheme: str = "fp8-sgl",
        text_encoder_quant_scheme: str | None = None,
        skip_fp8_block_index: Sequence[int] = (0, 43, 44, 45, 46, 47),
    ) -> None:
        """The FP8 or INT8 variant of the model; without it, the files' headers say what they hold."""
        self._take("enable_quantize", locals())

    @_like_lightx2v
    def enable_lora(self, lora_configs: Sequence[Any], lora_dynamic_apply: bool = False) -> None:
        """Refused: LoRA is not supported yet."""
        self._take("enable_lora", locals())
        self._translate()

    @_like_lightx2v
    def switch_lora(self, lora_path: str, strength: float = 1.0) -> None:
        """Refused, unless it switches LoRA off ("")."""
        if lora_path:
            raise RequestError(f"lora_path is {shown(lora_path)}; LoRA is not supported yet: leave it out.")

    @_like_lightx2v
    def enable_cache(
        self,
        cache_method: str = "Tea",
        coefficients: Sequence[float] = (),
        teacache_thresh: float = 0.15,
        use_ret_steps: bool = False,
        magcache_calibration: bool = False,
        magcache_K: int = 6,
        magcache_thresh: float = 0.24,
        magcache_retention_ratio: float = 0.2,
        magcache_ratios: Sequence[float] = (),
    ) -> None:
        """No effect: of four steps none resembles another so much that it could be left out."""
        self._take("enable_cache", {"cache_method": cache_method})

    @_like_lightx2v
    def enable_lightvae(
        self,
        use_lightvae: bool = False,
        use_tae: bool = False,
        vae_path: str | None = None,
        tae_path: str | None = None,
    ) -> None:
        """Refused where it is switched on: those autoencoders draw other pictures."""
        self._take("enable_lightvae", locals())
        self._translate()

    @_like_lightx2v
    def enable_parallel(
        self, cfg_p_size: int = 1, seq_p_size: int = 1, seq_p_attn_type: str = "ulysses"
    ) -> None:
        """No effect: one GPU makes one video here."""
        sizes = {"cfg_p_size": cfg_p_size, "seq_p_size": seq_p_size, "seq_p_attn_type": seq_p_attn_type}
        self._take("enable_parallel", {"parallel": sizes})
        self._by_default.add("parallel")  # told where the sizes are more than one, and not otherwise

    @_like_lightx2v
    def enable_compile(self) -> None:
        """No effect: at four steps compiling does not pay."""
        self._take("enable_compile", {"compile": True})

    # -------------------------------------------------------------------------------------------- the model

    @_like_lightx2v
    def create_generator(
        self,
        attn_mode: str = "flash_attn2",
        infer_steps: int = 50,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        guidance_scale: float = DEFAULT_GUIDANCE,
        sample_shift: float = 5.0,
        fps: int = 16,
        aspect_ratio: str = "16:9",
        boundary: float = 0.9,
        boundary_step_index: int = 2,
        denoising_step_list: Sequence[int] = (1000, 750, 500, 250),
        config_json: str | Path | None = None,
        rope_type: str = "torch_complex_rope",
        resize_mode: str | None = None,
        audio_fps: int = 24000,
        double_precision_rope: bool = True,
        norm_modulate_backend: str = "torch",
        distilled_sigma_values: Sequence[float] | None = None,
    ) -> None:
        """Load the model. With `config_json` that file says everything, and the other parameters nothing.

        A `guidance_scale` of 5.0 is taken for 1.0 by a distilled model, and told: it is the default, so it
        cannot be told from none, and in LightX2V it burns the picture. Another value is a wish and an error,
        as in `t2v generate`. Raises RequestError, WeightsError, DeviceError.
        """
        given = dict(locals())
        if config_json is not None:
            self._config |= read(Path(config_json))
        else:
            self._take("create_generator", given)
            self._take_guidance(guidance_scale)
        profile, device = select_device(self._device, load_profile(self._profile))
        translation = self._translate(profile)
        self._warn_moot(translation)
        wanted = translation.profile.get("quantization")
        model, changes = translation.options["model"], dict(translation.profile)
        if model in list_manifests():
            changes.pop("quantization", None)  # a variant that is named needs no profile to choose it
        if changes:
            profile = changed_profile(profile, changes)
        self._pipe = load_pipeline(model, None, profile, device, wanted)
        self._options = translation.options

    def _take_guidance(self, scale: float) -> None:
        """LightX2V's rule is: 1 is off, anything else on. Its default is not taken for a wish here."""
        distilled = self._sampling(load_profile(self._profile)).distilled
        self._config["enable_cfg"] = scale != 1
        self._names["enable_cfg"] = "guidance_scale"
        if distilled and scale == DEFAULT_GUIDANCE:
            self._config["enable_cfg"] = False
            self._tell(
                "guidance_scale",
                f"guidance_scale is {scale:g}, LightX2V's default; taken for 1.0, since guidance is "
                "distilled into this model's weights. Write guidance_scale=1.0.",
            )

    # ------------------------------------------------------------------------------------------- the videos

    @_like_lightx2v
    def generate(
        self,
        seed: int = 42,
        prompt: str = "",
        negative_prompt: str = "",
        save_result_path: str | Path = "lightx2v_gen_result.png",
        task: str | None = None,
        image_path: str | None = None,
        video_path: str | None = None,
        image_strength: float | None = None,
        i2i_denoise_strength: float | None = None,
        image_frame_idx: Sequence[int] | None = None,
        last_frame_path: str | None = None,
        audio_path: str | None = None,
        action_path: str | None = None,
        src_ref_images: str | None = None,
        src_video: str | None = None,
        src_mask: str | None = None,
        return_result_tensor: bool = False,
        target_shape: Sequence[int] = (),
        num_frames: int | None = None,
        sr_ratio: float = 2.0,
        prompt_ref: str | None = None,
    ) -> dict[str, Tensor | None]:
        """One video, written to `save_result_path` (an mp4, replacing what is there), or returned.

        With `return_result_tensor` nothing is written, and "video" is fp32 (F, H, W, 3) in [0, 1], of the 8
        bits that would be written; else "video" is None. `target_shape` is (H, W); `num_frames` counts,
        which LightX2V ignores for Wan. Raises RequestError, OutputError, OutputCheckError.
        """
        if self._pipe is None:
            raise RequestError(
                "generate() comes before create_generator(); call that first, it loads the model."
            )
        wanted = {k: v for k, v in locals().items() if k not in _NOT_KEYS}
        named = {RENAMED.get(name, name): value for name, value in wanted.items() if value is not None}
        translation = translate(named, self._pipe.manifest.sampling)
        self._refuse(translation, named)
        for entry in translation.wishes():
            self._tell(entry.key, f"{entry.sentence()}.")
        path = None if return_result_tensor else self._output(Path(save_result_path))
        chosen = dict(self._options) | {k: v for k, v in translation.options.items() if k in _FOR_A_VIDEO}
        video = self._pipe(
            prompt,
            seed=seed,
            num_frames=chosen.get("frames") if num_frames is None else num_frames,
            noise_device=self._where_noise_is_drawn(),
            sampler=self._sampler,
            accept_nonstandard=self._accept_nonstandard,
            **{name: chosen[name] for name in _FOR_A_VIDEO if name in chosen},
        )
        return {"video": self._give(video, path)}

    def _where_noise_is_drawn(self) -> str:
        assert self._pipe is not None
        if self._noise_device != "auto":
            return self._noise_device
        return "cpu" if self._pipe.device == "cpu" else "cuda"

    def _output(self, path: Path) -> Path:
        """The path of the mp4, proven writable before the minutes that the video takes."""
        if path.suffix.lower() != ".mp4":
            instead = path.with_suffix(".mp4")
            self._tell(
                "save_result_path", f"save_result_path is {path}: a video is written as mp4, to {instead}."
            )
            path = instead
        return check_output(path, overwrite=True)

    @staticmethod
    def _give(video: Video, path: Path | None) -> Tensor | None:
        if path is None:
            return torch.from_numpy(video.frames).float() / 255  # (F, H, W, 3)
        video.save(path, overwrite=True)
        return None

    # -------------------------------------------------------------------------------- what all of them share

    def _take(self, method: str, given: Mapping[str, Any]) -> None:
        """Keep what a call asks for, under LightX2V's keys."""
        if self._pipe is not None and method != "create_generator":
            self._tell(method, f"{method}() after create_generator() has no effect, as in LightX2V.")
            return
        parameters = inspect.signature(getattr(LightX2VPipeline, method)).parameters
        for name in (name for name in given if name not in NO_KEYS):
            key, value = RENAMED.get(name, name), given[name]
            default = parameters[name].default if name in parameters else None
            same = _plain(value) == _plain(default)
            self._by_default.discard(key)
            if same:
                self._by_default.add(key)
            if value is not None and key in KEYS and (value != "" or not same):
                self._config[key] = _plain(value)
                self._names[key] = name

    def _sampling(self, profile: Profile) -> Any:
        return manifest_of(self._config["model_path"], profile).sampling

    def _translate(self, profile: Profile | None = None) -> Translation:
        sampling = self._sampling(profile or load_profile(self._profile))
        translation = translate(self._config, sampling)
        self._refuse(translation, self._config)
        return translation

    def _refuse(self, translation: Translation, config: Mapping[str, Any]) -> None:
        """RequestError for the first fault, by the parameter's name and value."""
        for entry in translation.faults(self._accept_nonstandard):
            name = self._names.get(entry.key, entry.key)
            value = config.get("sample_guide_scale") if name == "guidance_scale" else entry.value
            why = entry.outcome.why
            if name == "guidance_scale":
                why = "expected 1.0: guidance is distilled into the weights, and twice burns the picture"
            hint = "pass accept_nonstandard=True to LightX2VPipeline to try"
            more = f"; {hint}" if entry.status != "refused" else ""
            raise RequestError(f"{name} is {shown(value)}: {why}{more}.")

    def _warn_moot(self, translation: Translation) -> None:
        """Once for each parameter that was given and has no effect, or whose effect is missed."""
        for entry in translation.entries:
            passed = entry.key in self._names and entry.key not in self._by_default
            if entry.status == "moot" and (entry.outcome.wish or (passed and entry.value)):
                name = self._names.get(entry.key, entry.key)
                if name == "guidance_scale":
                    continue
                self._tell(name, f"{entry.sentence(name)}.")

    def _tell(self, topic: str, message: str) -> None:
        """A LightX2VWarning at the caller's line, the first time that `topic` comes up."""
        if topic in self._told:
            return
        self._told.add(topic)
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_code.co_filename == __file__:
            level, frame = level + 1, frame.f_back
        warnings.warn(message, LightX2VWarning, stacklevel=level)


def _plain(value: Any) -> Any:
    """As JSON has it: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value


_FOR_A_VIDEO = ("height", "width", "fps", "steps", "guidance", "negative_prompt")
_NOT_KEYS = ("self", "seed", "prompt", "save_result_path", "return_result_tensor", "num_frames")


def load_pipeline(
    model: str,
    weights: Path | None,
    profile: Profile,
    device: str,
    wanted: Quantization | None,
    **options: Any,
) -> Pipeline:
    """`Pipeline.load`, with its `options`, for weights that must be `wanted`.

    Raises WeightsError, from their headers, where they are something else.
    """
    if wanted is not None:
        manifest, directory = find_model(model, profile, weights)
        found = find_component(directory, manifest.subdirectories, manifest.files.transformer)
        expect_quantization(open_checkpoint(found, "transformer"), wanted)
    return Pipeline.load(weights, model=model, profile=profile, device=device, **options)
