"""What may become of a key of a LightX2V configuration: types of values, outcomes, a rule for each kind.

`runtime.lightx2v.keys` says which key has which rule, `runtime.lightx2v.config` applies them to a file.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Literal

from runtime.profiles import DIRECTORY_FAMILY, list_manifests, load_manifest
from runtime.schema import Quantization, Sampling

Status = Literal["used", "moot", "nonstandard", "refused", "unknown"]

BACKENDS = ("sgl", "vllm", "torchao", "triton", "q8f")
"""Of LightX2V's 8-bit schemes: kernels for the same files, one scale for each output channel."""

PLACEHOLDERS = ("lightx2v/", "/path/to/", "path/to/")
"""How the paths in LightX2V's own configurations begin: a repository's name, or nothing that exists."""

DTYPE_NAMES = {
    **dict.fromkeys(("fp32", "float32"), "fp32"),
    **dict.fromkeys(("fp16", "float16", "half"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
}


@dataclass(frozen=True)
class Outcome:
    """What becomes of one key. `options` are those of `t2v generate`; `profile` has dotted field names."""

    status: Status
    here: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    wish: bool = False  # moot, although it was asked for: worth a line of its own


@dataclass(frozen=True)
class Context:
    """The whole configuration, of which only values of the right type are left, and the model's sampling."""

    config: Mapping[str, Any]
    sampling: Sampling


Rule = Callable[[Any, Context], Outcome]


@dataclass(frozen=True)
class Wanted:
    """A type of value, in words and as a test."""

    words: str
    fits: Callable[[object], bool]


@dataclass(frozen=True)
class Key:
    """One key: what its value must be, and what becomes of it."""

    wanted: Wanted
    rule: Rule


# -------------------------------------------------------------------------------------------- types of values


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _is_number(value: object) -> bool:
    return _is_count(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: object) -> bool:
    # Half of a surrogate pair is valid JSON and no text: it can be neither printed nor written.
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_path(value: object) -> bool:
    return _is_text(value) and isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()


def _are(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) <= 1000 and all(fits(item) for item in value)


FLAG = Wanted("true or false", lambda value: isinstance(value, bool))
COUNT = Wanted("a whole number", _is_count)
NUMBER = Wanted("a number", _is_number)
TEXT = Wanted("text", _is_text)
PATH = Wanted("a path", _is_path)
PATH_OR_FALSE = Wanted("a path", lambda value: value is False or _is_path(value))
"""False is the default of some paths in LightX2V's Python interface."""
COUNTS = Wanted("a list of whole numbers", lambda value: _are(value, _is_count))
SIZE = Wanted(
    "a list of two whole numbers, height and width",
    lambda value: isinstance(value, list | tuple) and len(value) == 2 and _are(value, _is_count),
)
LIST = Wanted("a list", lambda value: isinstance(value, list | tuple))
OBJECT = Wanted("an object, or false", lambda value: value is False or isinstance(value, dict))
ANYTHING = Wanted("a value", lambda value: True)


# ------------------------------------------------------------------------------------------------------ rules


def option(name: str, why: str = "the same") -> Rule:
    """The key is an option of `t2v generate` by another name."""

    def rule(value: Any, _: Context) -> Outcome:
        return Outcome("used", f"--{name.replace('_', '-')}", why, options={name: value})

    return rule


def moot(why: str, *, wish: bool = False) -> Rule:
    """The key has no meaning here; with `wish`, that is told wherever it is set to something."""

    def rule(value: Any, _: Context) -> Outcome:
        return Outcome("moot", "", why, wish=wish and bool(value))

    return rule


def fixed(*values: Any, why: str) -> Rule:
    """The key may only say what is so anyway."""

    def rule(value: Any, _: Context) -> Outcome:
        if (tuple(value) if isinstance(value, list) else value) in values:
            return Outcome("used", "", "so it is here")
        expected = " or ".join(str(list(v) if isinstance(v, tuple) else v) for v in values)
        return Outcome("refused", "", f"expected {expected}: {why}")

    return rule


def missing(why: str) -> Rule:
    """A feature that this engine has not, and that would change the picture."""

    def rule(value: Any, _: Context) -> Outcome:
        if value in (None, False, "", [], (), {}):
            return Outcome("used", "", "off, as it always is here")
        return Outcome("refused", "", why)

    return rule


def infer_steps(value: Any, context: Context) -> Outcome:
    if not context.sampling.distilled:
        return Outcome("used", "--steps", "the same", options={"steps": value})
    if value == len(_step_list(context)):
        return Outcome("used", "", "so it is here: the list of steps is as long")
    why = f"the length of the list of steps decides, as in LightX2V: {len(_step_list(context))} steps"
    return Outcome("moot", "", why, wish=True)


def _step_list(context: Context) -> list[int]:
    given = context.config.get("denoising_step_list")
    return list(given) if given else even_steps(context.sampling.steps)


def even_steps(steps: int) -> list[int]:
    """The step list of this engine's schedule: [1000, 750, 500, 250] for 4 (see runtime.sampler.schedule)."""
    return [round(1000 * (steps - i) / steps) for i in range(steps)]


def denoising_step_list(value: Any, context: Context) -> Outcome:
    steps, given = context.sampling.steps, list(value)
    if not context.sampling.distilled:
        return Outcome("moot", "", "only distilled models have a list of steps")
    if given == even_steps(steps):
        return Outcome("used", "--steps", "the steps that the model is distilled for", {"steps": steps})
    if given and len(given) <= 1000 and given == even_steps(len(given)):
        why = f"the model is distilled for {even_steps(steps)}; others make its pictures worse"
        return Outcome("nonstandard", "--steps", why, {"steps": len(given)})
    return Outcome("refused", "", f"expected {even_steps(steps)}: the model is distilled for these")


def sample_shift(value: Any, context: Context) -> Outcome:
    if value == context.sampling.shift:
        return Outcome("used", "", "the model's own shift")
    return Outcome("refused", "", f"expected {context.sampling.shift:g}: the model is made for that shift")


def enable_cfg(value: Any, context: Context) -> Outcome:
    if not value:
        return Outcome("used", "", "one forward a step, as here")
    if not context.sampling.distilled:
        return Outcome("used", "--guidance", "see sample_guide_scale")
    return Outcome(
        "refused", "", "expected false: guidance is distilled into the weights, and twice burns the picture"
    )


def guide_scale(value: Any, context: Context) -> Outcome:
    if not context.config.get("enable_cfg"):
        return Outcome("moot", "", "enable_cfg is not true, so LightX2V does not use it either")
    if not context.sampling.distilled:
        return Outcome("used", "--guidance", "the same", options={"guidance": value})
    return Outcome("moot", "", "guidance is distilled into the weights (see enable_cfg)")


def negative_prompt(value: Any, context: Context) -> Outcome:
    if not value:
        return Outcome("moot", "", "empty")
    if context.sampling.distilled:
        return Outcome("moot", "", "the model runs without guidance, so nothing would use it", wish=True)
    return Outcome("used", "--negative-prompt", "the same", options={"negative_prompt": value})


def both_sizes(value: Any, _: Context) -> Outcome:
    height, width = value
    return Outcome("used", "--height, --width", "the same", options={"height": height, "width": width})


def target_shape(value: Any, context: Context) -> Outcome:
    if not value:
        return Outcome("moot", "", "empty")
    if len(value) != 2:
        return Outcome("refused", "", "expected [height, width]")
    return both_sizes(value, context)


# ------------------------------------------------------------------------------------------- memory and files


def cpu_offload(value: Any, context: Context) -> Outcome:
    if not value:
        return Outcome("moot", "", "where things stay is the profile's matter")
    homes = {"text_encoder": "t5_cpu_offload", "vae": "vae_cpu_offload"}
    followers = {part: key for part, key in homes.items() if context.config.get(key) is None}
    placed = {f"{part}.stay_on_gpu": False for part in followers}
    why = "the memory plan streams the blocks that do not fit, and only those; `t2v plan` shows it"
    if followers:
        why += f"; {' and '.join(followers.values())} follow it, as in LightX2V"
    return Outcome("moot", ", ".join(f"profile {name}: false" for name in placed), why, {}, placed)


def offload(part: str) -> Rule:
    def rule(value: Any, _: Context) -> Outcome:
        name = f"{part}.stay_on_gpu"
        if value:
            why = "it rests in RAM and visits the GPU for its phase"
            return Outcome("used", f"profile {name}: false", why, profile={name: False})
        return Outcome("moot", "", "the card's profile knows whether it fits beside the transformer")

    return rule


def scheme_quantization(scheme: str) -> Quantization | None:
    """The weights that a scheme of LightX2V's reads, None for those that are not supported.

    `fp8-sgl`, `int8-vllm`, ...; or the older `W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm`.
    """
    kind, _, backend = scheme.partition("-")
    old = re.match(r"W-(fp8|int8)-channel-sym-A-\1-channel-sym-dynamic", scheme)
    if old:
        kind = old[1]
    elif backend and backend not in BACKENDS:
        return None
    return "fp8" if kind == "fp8" else "int8" if kind == "int8" else None


def _scheme_of(context: Context) -> str | None:
    old = context.config.get("mm_config")
    older = old.get("mm_type") if isinstance(old, dict) else None
    scheme = context.config.get("dit_quant_scheme") or older
    return scheme if isinstance(scheme, str) else None


def dit_quantized(value: Any, context: Context) -> Outcome:
    if not value:
        return Outcome("moot", "", "what the weights are is read from the headers of their files")
    if _scheme_of(context) is None:
        return Outcome("refused", "", "say which 8-bit format with dit_quant_scheme: fp8-sgl or int8-vllm")
    return Outcome("used", "", "see dit_quant_scheme")


def dit_quant_scheme(value: Any, context: Context) -> Outcome:
    if not isinstance(value, str) and (not value or value.get("mm_type", "Default") == "Default"):
        return Outcome("moot", "", "what the weights are is read from the headers of their files")
    if isinstance(value, str) and not context.config.get("dit_quantized"):
        return Outcome("moot", "", "dit_quantized is not true, so LightX2V does not use it either")
    scheme = value if isinstance(value, str) else value["mm_type"]  # mm_config, which older versions had
    quantization = scheme_quantization(scheme) if isinstance(scheme, str) else None
    if quantization is None:
        known = ", ".join(f"{kind}-{backend}" for kind in ("fp8", "int8") for backend in BACKENDS)
        return Outcome("refused", "", f"no format that is read here: expected one of {known}")
    profile = {"quantization": quantization}
    why = f"the {quantization} weights; the kernels are this engine's own"
    published = _published(context)
    if published is not None and load_manifest(published).quantization != quantization:
        return Outcome("refused", "", f"dit_quantized_ckpt names a file of {published}: expected its format")
    if published is not None or _directory_of(context) is not None:
        return Outcome("used", f"the {quantization} variant", why, profile=profile)
    return Outcome("used", "--model", why, {"model": f"{DIRECTORY_FAMILY}-{quantization}"}, profile)


def _directory_of(context: Context) -> str | None:
    """The directory of weights that the configuration names, whichever key does; None if none does."""
    root = context.config.get("model_path")
    return str(root) if root else _checkpoint_directory(context)


def _checkpoint_key(context: Context) -> str:
    return "dit_quantized_ckpt" if context.config.get("dit_quantized") else "dit_original_ckpt"


def _checkpoint_directory(context: Context) -> str | None:
    path = context.config.get(_checkpoint_key(context))
    if not path or str(path).startswith(PLACEHOLDERS):
        return None
    place = PurePosixPath(path)
    inside = place.parent if place.suffix in (".safetensors", ".pt", ".pth") else place
    return str(inside) if inside.is_absolute() or str(inside).startswith((".", "~")) else f"./{inside}"


def _published(context: Context) -> str | None:
    """The manifest of a checkpoint that LightX2V's own configurations name, without saying where it lies."""
    path = context.config.get(_checkpoint_key(context))
    if not path or not str(path).startswith(PLACEHOLDERS):
        return None
    return published_names().get(PurePosixPath(path).name)


@cache
def published_names() -> dict[str, str]:
    """Names of the default family's transformers (files, directories) -> the manifest that they are of."""
    manifests = [load_manifest(name) for name in list_manifests()]
    return {
        name: manifest.name
        for manifest in manifests
        if manifest.family == DIRECTORY_FAMILY
        for name in (*manifest.files.transformer, *manifest.subdirectories)
        if name != "."
    }


def checkpoint(key: str) -> Rule:
    def rule(value: Any, context: Context) -> Outcome:
        if not value or key != _checkpoint_key(context):
            return Outcome("moot", "", "LightX2V does not use it either (see dit_quantized)")
        if "i2v" in PurePosixPath(value).name:
            return Outcome("refused", "", "these weights are for image to video: expected those of t2v")
        directory, root = _checkpoint_directory(context), context.config.get("model_path")
        if directory is None:
            published = _published(context)
            if published is None:
                return Outcome("refused", "", "no such path, and no published name: name your directory")
            if root:
                return Outcome("used", "--model", "found in model_path by its name")
            why = "a published file, found by its name in the directory of weights"
            return Outcome("used", "--model", why, options={"model": published})
        if root and not PurePosixPath(directory).is_relative_to(PurePosixPath(root)):
            why = "it is not in model_path, and a model is one directory here: put or link it there"
            return Outcome("refused", "", why)
        if root:
            return Outcome("used", "--model", "found in model_path by what lies there")
        return Outcome("used", "--model", "the directory of the model", options={"model": directory})

    return rule


def part_path(what: str) -> Rule:
    """A path of its own for text encoder, VAE or tokenizer."""

    def rule(value: Any, context: Context) -> Outcome:
        root = context.config.get("model_path")
        if not value:
            return Outcome("moot", "", "not set")
        if str(value).startswith(PLACEHOLDERS):
            return Outcome("moot", "", f"the {what} is looked for in the model's directory by its name")
        if root and PurePosixPath(value).is_relative_to(PurePosixPath(root)):
            return Outcome("used", "--model", "found in model_path by what lies there")
        why = f"the {what} is looked for in the model's directory, by its published name: link it there"
        return Outcome("refused", "", why)

    return rule


def vae_dtype(value: Any, _: Context) -> Outcome:
    dtype = DTYPE_NAMES.get(value.lower().removeprefix("torch."))
    if dtype is None:
        return Outcome("refused", "", "expected bf16, fp16 or fp32")
    why = "what the decode computes in"
    return Outcome("used", f"profile vae.dtype: {dtype}", why, profile={"vae.dtype": dtype})


def feature_caching(value: Any, _: Context) -> Outcome:
    if value == "NoCaching":
        return Outcome("used", "", "off, as it always is here")
    return Outcome("moot", "", "nothing repeats in four steps: a cache could only do harm", wish=True)


def parallel(value: Any, _: Context) -> Outcome:
    sizes = [size for key, size in value.items() if key.endswith("_size")] if value else []
    several = any(_is_count(size) and size > 1 for size in sizes)
    return Outcome("moot", "", "one GPU makes one video here; the picture is the same", wish=several)


def text_len(value: Any, context: Context) -> Outcome:
    if value == context.sampling.text_len:
        return Outcome("used", "", "so it is here")
    if value == 512:  # of all Wan models; the demo, which is none, has its own
        return Outcome("moot", "", f"the model's own is {context.sampling.text_len}")
    return Outcome("refused", "", f"expected {context.sampling.text_len}: the model is trained with that")
