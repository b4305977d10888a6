"""Tensor names of other publishers, as data: diffusers and transformers names beside the Wan names.

The canonical names are those of the original Wan files. Each table row pairs a Wan module path with the path
of the same module elsewhere; `{n}` is a layer number and a suffix (`.weight`, `.bias`, `.weight_scale`) is
carried over, so quantized files are covered by the same rows. Both directions are read from the one table.
"""

import re
from collections.abc import Iterable
from typing import Literal

Kind = Literal["transformer", "text_encoder", "vae"]
Pair = tuple[str, str]

PREFIXES = ("model.diffusion_model.", "diffusion_model.")

_ATTENTION = [
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
]

TRANSFORMER: list[Pair] = [  # Wan, diffusers WanTransformer3DModel
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    *((f"blocks.{{n}}.self_attn.{ours}", f"blocks.{{n}}.attn1.{theirs}") for ours, theirs in _ATTENTION),
    *((f"blocks.{{n}}.cross_attn.{ours}", f"blocks.{{n}}.attn2.{theirs}") for ours, theirs in _ATTENTION),
    ("blocks.{n}.norm3", "blocks.{n}.norm2"),
    ("blocks.{n}.ffn.0", "blocks.{n}.ffn.net.0.proj"),
    ("blocks.{n}.ffn.2", "blocks.{n}.ffn.net.2"),
    ("blocks.{n}.modulation", "blocks.{n}.scale_shift_table"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
]

TEXT_ENCODER: list[Pair] = [  # Wan, transformers UMT5EncoderModel
    ("token_embedding", "shared"),
    ("blocks.{n}.norm1", "encoder.block.{n}.layer.0.layer_norm"),
    *((f"blocks.{{n}}.attn.{m}", f"encoder.block.{{n}}.layer.0.SelfAttention.{m}") for m in "qkvo"),
    ("blocks.{n}.pos_embedding.embedding", "encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias"),
    ("blocks.{n}.norm2", "encoder.block.{n}.layer.1.layer_norm"),
    ("blocks.{n}.ffn.gate.0", "encoder.block.{n}.layer.1.DenseReluDense.wi_0"),  # the one through gelu
    ("blocks.{n}.ffn.fc1", "encoder.block.{n}.layer.1.DenseReluDense.wi_1"),
    ("blocks.{n}.ffn.fc2", "encoder.block.{n}.layer.1.DenseReluDense.wo"),
    ("norm", "encoder.final_layer_norm"),
]
# The encoder's table under its second name (tied to `shared`), the tokenizer that ComfyUI packs into its
# file, and the half of the full umT5 that an encoder does not run.
TEXT_ENCODER_SPARE = re.compile(r"encoder\.embed_tokens\.weight|spiece_model|decoder\..*|lm_head\.weight")

_RESIDUAL = [
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
]
_RESIDUAL += [("shortcut", "conv_shortcut")]
_RESAMPLE = [("resample.1", "resample.1"), ("time_conv", "time_conv")]
_ATTENTION_2D = [("norm", "norm"), ("to_qkv", "to_qkv"), ("proj", "proj")]


def vae_pairs(stage: int = 4) -> list[Pair]:
    """Wan and diffusers AutoencoderKLWan. `stage`: modules of one decoder stage (resnets + 1 upsampler).

    Wan numbers the decoder's modules through, diffusers groups them by stage; the encoder is flat in both.
    """
    pairs = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        pairs += [(f"{half}.conv1", f"{half}.conv_in"), (f"{half}.head.0", f"{half}.norm_out")]
        pairs += [(f"{half}.head.2", f"{half}.conv_out")]
        for ours, theirs in (("0", "resnets.0"), ("2", "resnets.1")):
            pairs += [(f"{half}.middle.{ours}.{a}", f"{half}.mid_block.{theirs}.{b}") for a, b in _RESIDUAL]
        pairs += [(f"{half}.middle.1.{a}", f"{half}.mid_block.attentions.0.{b}") for a, b in _ATTENTION_2D]
    pairs += [
        (f"encoder.downsamples.{{n}}.{a}", f"encoder.down_blocks.{{n}}.{b}") for a, b in _RESIDUAL + _RESAMPLE
    ]
    for level in range(8):
        for i in range(stage):
            ours = f"decoder.upsamples.{level * stage + i}"
            theirs = f"decoder.up_blocks.{level}.resnets.{i}"
            pairs += [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESIDUAL]
            if i == stage - 1:
                theirs = f"decoder.up_blocks.{level}.upsamplers.0"
                pairs += [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESAMPLE]
    return pairs


_FOREIGN = {
    "transformer": re.compile(r"condition_embedder\.|blocks\.\d+\.attn[12]\."),
    "text_encoder": re.compile(r"encoder\.block\.\d+\.|shared\.weight$"),
    "vae": re.compile(r"(encoder|decoder)\.(mid_block|down_blocks|up_blocks|conv_in)"),
}


def strip_prefix(name: str) -> str:
    """The name without the prefix that third-party files put before every tensor."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def to_canonical(kind: Kind, names: Iterable[str]) -> dict[str, str | None]:
    """Stored name -> Wan name; None for tensors that the model does not use. Unknown names stay."""
    stripped = {name: strip_prefix(name) for name in names}
    if not any(_FOREIGN[kind].match(name) for name in stripped.values()):
        return dict(stripped)
    forward = _renamer([(theirs, ours) for ours, theirs in _table(kind, stripped.values())])
    result: dict[str, str | None] = {name: forward(bare) for name, bare in stripped.items()}
    if kind == "text_encoder":
        for name, bare in stripped.items():
            if TEXT_ENCODER_SPARE.fullmatch(bare):
                lone = bare == "encoder.embed_tokens.weight" and "shared.weight" not in stripped.values()
                result[name] = "token_embedding.weight" if lone else None
    return result


def from_canonical(kind: Kind, names: Iterable[str]) -> dict[str, str]:
    """Wan name -> diffusers or transformers name, the inverse of `to_canonical`."""
    names = list(names)
    backward = _renamer(_table(kind, names))
    return {name: backward(name) for name in names}


def _table(kind: Kind, names: Iterable[str]) -> list[Pair]:
    if kind == "vae":
        return vae_pairs(_stage(names))
    return TRANSFORMER if kind == "transformer" else TEXT_ENCODER


def _stage(names: Iterable[str]) -> int:
    """Modules of a decoder stage: its resnets and one upsampler."""
    names = list(names)
    ours = [
        int(m.group(1)) for m in map(re.compile(r"decoder\.upsamples\.(\d+)\.resample").match, names) if m
    ]
    theirs = [
        int(m.group(1)) for m in map(re.compile(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.").match, names) if m
    ]
    if ours:
        return min(ours) + 1
    return max(theirs) + 2 if theirs else 4


class _renamer:
    """Renames by the first pair whose left template is the name's module path."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.rules = []
        for left, right in pairs:
            pattern = re.escape(left).replace(r"\{n\}", r"(?P<n>\d+)")
            self.rules.append((re.compile(rf"{pattern}(?P<suffix>\.[a-z_]+)?"), right))

    def __call__(self, name: str) -> str:
        for pattern, right in self.rules:
            if match := pattern.fullmatch(name):
                number = match.groupdict().get("n") or ""
                return right.replace("{n}", number) + (match.group("suffix") or "")
        return name
