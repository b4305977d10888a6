"""Which model a set of tensors is, and its sizes: tables of names and shapes (those of the original files).

A shape table says every size once by name: `("ffn_dim", "dim")` is a matrix of ffn_dim rows. Sizes are
solved from the tensors and each further tensor must agree, so a file of mixed parts is found before loading.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.checkpoint.files import TensorInfo
from runtime.checkpoint.names import Kind, strip_prefix
from runtime.errors import WeightsError

Token = str | int | None  # a size's name ("dim"), a multiple of one ("6*dim"), a number, or anything
HEAD_DIM = 128  # of every Wan transformer

_ATTENTION_MATRICES = [f"{part}_attn.{m}" for part in ("self", "cross") for m in "qkvo"]

TRANSFORMER_SHAPES: dict[str, tuple[Token, ...]] = {
    "patch_embedding.weight": ("dim", "in_dim", 1, 2, 2),
    "patch_embedding.bias": ("dim",),
    "text_embedding.0.weight": ("dim", "text_dim"),
    "text_embedding.2.weight": ("dim", "dim"),
    "time_embedding.0.weight": ("dim", "freq_dim"),
    "time_embedding.2.weight": ("dim", "dim"),
    "time_projection.1.weight": ("6*dim", "dim"),
    "head.modulation": (1, 2, "dim"),
    "head.head.weight": ("4*out_dim", "dim"),
    "blocks.{n}.modulation": (1, 6, "dim"),
    "blocks.{n}.norm3.weight": ("dim",),
    **{f"blocks.{{n}}.{m}.weight": ("dim", "dim") for m in _ATTENTION_MATRICES},
    **{f"blocks.{{n}}.{part}_attn.norm_{m}.weight": ("dim",) for part in ("self", "cross") for m in "qk"},
    "blocks.{n}.ffn.0.weight": ("ffn_dim", "dim"),
    "blocks.{n}.ffn.2.weight": ("dim", "ffn_dim"),
}
TEXT_ENCODER_SHAPES: dict[str, tuple[Token, ...]] = {
    "token_embedding.weight": ("vocab_size", "dim"),
    "norm.weight": ("dim",),
    **{f"blocks.{{n}}.attn.{m}.weight": ("dim_attn", "dim") for m in "qkv"},
    "blocks.{n}.attn.o.weight": ("dim", "dim_attn"),
    "blocks.{n}.pos_embedding.embedding.weight": ("num_buckets", "num_heads"),
    "blocks.{n}.ffn.gate.0.weight": ("dim_ffn", "dim"),
    "blocks.{n}.ffn.fc1.weight": ("dim_ffn", "dim"),
    "blocks.{n}.ffn.fc2.weight": ("dim", "dim_ffn"),
}
VAE_SHAPES: dict[str, tuple[Token, ...]] = {
    "encoder.conv1.weight": ("base_dim", 3, 3, 3, 3),
    "conv1.weight": ("2*z_dim", "2*z_dim", 1, 1, 1),
    "conv2.weight": ("z_dim", "z_dim", 1, 1, 1),
    "decoder.conv1.weight": (None, "z_dim", 3, 3, 3),
    "encoder.head.2.weight": ("2*z_dim", None, 3, 3, 3),
    "decoder.head.2.weight": (3, "base_dim", 3, 3, 3),
}
SHAPES: dict[Kind, dict[str, tuple[Token, ...]]] = {
    "transformer": TRANSFORMER_SHAPES,
    "text_encoder": TEXT_ENCODER_SHAPES,
    "vae": VAE_SHAPES,
}
# The matrices that converters quantize: ten per transformer block, seven per text encoder block.
LINEARS: dict[Kind, re.Pattern[str]] = {
    "transformer": re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])"),
    "text_encoder": re.compile(r"blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate\.0|fc1|fc2))"),
    "vae": re.compile(r"(?!)"),
}
_OTHER_INPUTS = {36: "an image-to-video transformer", 48: "the Wan2.2 TI2V-5B transformer"}

# config.json's word -> ours. A config speaks of the model only when it carries the key in `_CONFIG_MARK`:
# beside a text encoder or a VAE there usually lies the transformer's config.
_CONFIG_KEYS: dict[Kind, dict[str, str]] = {
    "transformer": {
        **{
            k: k
            for k in (
                "dim",
                "ffn_dim",
                "num_heads",
                "num_layers",
                "in_dim",
                "out_dim",
                "freq_dim",
                "text_dim",
            )
        },
        **{k: k for k in ("text_len", "eps")},
        "num_attention_heads": "num_heads",
        "in_channels": "in_dim",
        "out_channels": "out_dim",
    },
    "text_encoder": {
        "d_model": "dim",
        "d_ff": "dim_ffn",
        "num_heads": "num_heads",
        "num_layers": "num_layers",
        "vocab_size": "vocab_size",
        "relative_attention_num_buckets": "num_buckets",
        "relative_attention_max_distance": "max_distance",
        "layer_norm_epsilon": "eps",
    },
    "vae": {"base_dim": "base_dim", "z_dim": "z_dim"},
}
_CONFIG_MARK: dict[Kind, str] = {"transformer": "ffn_dim", "text_encoder": "d_ff", "vae": "z_dim"}

# Names by which a family is known, its own and other publishers'; the first match of a file's tensors counts.
_FAMILIES: list[tuple[str, re.Pattern[str]]] = [
    ("a LoRA", re.compile(r".*[._]lora[._]|.*\.diff(_b|_m)?$")),
    (
        "an image-to-video transformer",
        re.compile(r"img_emb\.|blocks\.\d+\.cross_attn\.k_img|condition_embedder\.image"),
    ),
    ("a VACE transformer", re.compile(r"vace_")),
    (
        "a Wan transformer",
        re.compile(r"patch_embedding\.|blocks\.\d+\.(self_attn|cross_attn|attn[12])\.|head\.head\."),
    ),
    (
        "a umT5 text encoder",
        re.compile(r"blocks\.\d+\.(attn\.|pos_embedding)|encoder\.block\.\d+\.|token_embedding\."),
    ),
    ("a CLIP image encoder", re.compile(r"(visual\.|vision_model\.|textual\.|text_model\.)")),
    (
        "a Wan VAE",
        re.compile(r"(encoder|decoder)\.(middle|mid_block|downsamples|upsamples|up_blocks|down_blocks)"),
    ),
    ("a tiny autoencoder (TAEHV)", re.compile(r"(encoder|decoder)\.\d+\.")),
    ("a umT5 text encoder", re.compile(r"blocks\.\d+\.(ffn\.(gate|fc[12])|norm1)\.")),
    (
        "a Wan transformer",
        re.compile(r"blocks\.\d+\.(ffn|norm|modul)|(text|time)_embedding\.|time_projection\."),
    ),
]
WANTED: dict[Kind, str] = {
    "transformer": "a Wan transformer",
    "text_encoder": "a umT5 text encoder",
    "vae": "a Wan VAE",
}


def family(names: Iterable[str]) -> str | None:
    """What tensors of these stored names look like ("a Wan VAE"); None when nothing is recognised."""
    bare = [strip_prefix(name) for name in names]
    for label, pattern in _FAMILIES:
        if any(pattern.match(name) for name in bare):
            return label
    return None


def check_family(kind: Kind, where: Path, names: Iterable[str]) -> None:
    """WeightsError when the stored names belong to another model than the slot's."""
    names = list(names)
    found = family(names)
    if found != WANTED[kind]:
        seen = (
            f"looks like {found}"
            if found
            else f"is not known (first tensors: {', '.join(names[:3]) or 'none'})"
        )
        raise WeightsError(f"{where} {seen}; expected {WANTED[kind]}")


def solve_sizes(kind: Kind, where: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Model sizes from tensor shapes, and the number of blocks; WeightsError when two tensors disagree.

    Tensors that are absent are not reported here but by the strict loading, unless a size is known from them
    alone.
    """
    layers = _count_blocks(kind, where, tensors)
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for template, tokens in SHAPES[kind].items():
        names = [template.replace("{n}", str(n)) for n in range(layers)] if "{n}" in template else [template]
        for name in names:
            if name in tensors:
                _unify(tensors[name], tokens, sizes, origin)
            unknown.update(
                {s: name for s in map(_size_name, tokens) if s and s not in sizes and s not in unknown}
            )
    for size, name in unknown.items():
        if size not in sizes:
            raise WeightsError(
                f"{where} has no tensor {name}, so the model's {size} is unknown; the file is incomplete"
            )
    if kind != "vae":
        sizes["num_layers"] = layers
    if kind == "transformer" and sizes["in_dim"] in _OTHER_INPUTS:
        raise WeightsError(
            f"{where} looks like {_OTHER_INPUTS[sizes['in_dim']]} ({sizes['in_dim']} input channels); "
            "expected a text-to-video transformer (16)"
        )
    return sizes


def _count_blocks(kind: Kind, where: Path, tensors: Iterable[str]) -> int:
    if kind == "vae":
        return 0
    numbers = {int(match.group(1)) for match in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if match}
    if not numbers:
        raise WeightsError(f"{where} has no tensor of any block (blocks.0. ...); the file is incomplete")
    absent = max(numbers) + 1 - len(numbers)
    if absent:  # counted, not listed: a scribbled name may say any number
        first = next(number for number in itertools.count() if number not in numbers)
        raise WeightsError(
            f"{where} has blocks up to {max(numbers)} but no tensor of block {first}"
            f"{f' and {absent - 1} more' if absent > 1 else ''} (block_{first}.safetensors?); download it"
        )
    return len(numbers)


def _size_name(token: Token) -> str | None:
    return token.split("*")[-1] if isinstance(token, str) else None


def _unify(
    info: TensorInfo, tokens: tuple[Token, ...], sizes: dict[str, int], origin: dict[str, str]
) -> None:
    """Bind the sizes that this tensor tells; WeightsError when it disagrees with a tensor before it."""
    wrong = f"{info.file}: tensor {info.name} has shape {info.shape}"
    if len(info.shape) != len(tokens):
        raise WeightsError(f"{wrong}, expected {len(tokens)} dimensions")
    for length, token in zip(info.shape, tokens, strict=True):
        name = _size_name(token)
        if name is None:
            if token is not None and length != token:
                raise WeightsError(f"{wrong}, expected ({', '.join(str(t or 'any') for t in tokens)})")
            continue
        factor = int(str(token).split("*")[0]) if "*" in str(token) else 1
        known = sizes.setdefault(name, length // factor)
        if known * factor != length or known == 0:
            first = origin.get(name, info.name)
            raise WeightsError(
                f"{wrong}, expected {token} = {known * factor} as {first} says; the parts do not match"
            )
        origin.setdefault(name, info.name)


def read_config(kind: Kind, where: Path) -> dict[str, Any]:
    """What `config.json` beside the weights says about this kind of model, in our words; {} if nothing."""
    path = (where if where.is_dir() else where.parent) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error}); download it again or remove it") from error
    if not isinstance(config, dict) or _CONFIG_MARK[kind] not in config:
        return {}
    model_type = config.get("model_type", "t2v")
    if kind == "transformer" and model_type != "t2v":
        raise WeightsError(f"{path} says model_type {model_type!r}; expected a text-to-video model ('t2v')")
    said = {ours: config[theirs] for theirs, ours in _CONFIG_KEYS[kind].items() if theirs in config}
    for key, value in said.items():
        number = isinstance(value, float) if key == "eps" else type(value) is int  # bool is an int too
        if not number or not 0 < value < 2**31:
            raise WeightsError(f"{path} says {key} {value!r}; expected a positive number")
    return said


def merge_config(kind: Kind, where: Path, sizes: dict[str, int], config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, and what only the config tells (heads, text_len, eps); WeightsError if the two disagree."""
    merged: dict[str, Any] = dict(sizes)
    if kind == "transformer":
        dim, heads = sizes["dim"], config.get("num_heads")
        if dim % HEAD_DIM == 0:
            merged["num_heads"] = dim // HEAD_DIM
        elif heads and dim % heads == 0:
            merged["num_heads"] = heads
        else:
            raise WeightsError(
                f"{where} has dim {dim}, expected a multiple of {HEAD_DIM} (the size of a Wan head)"
            )
    for key, said in config.items():
        if merged.setdefault(key, said) != said:
            raise WeightsError(
                f"{where}: config.json says {key} {said}, the tensors {merged[key]}; one is of another model"
            )
    return merged
