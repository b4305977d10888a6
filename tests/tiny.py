"""A tiny random checkpoint in the published layout: the engine's real classes, a megabyte, a second to make.

    root/google/umt5-xxl/tokenizer.json
    root/distill_models/   distill_model.safetensors, one file                        (bf16)
    root/distill_fp8/      block_N.safetensors, non_block.safetensors, an index       (fp8)
    root/distill_int8/     the same                                                   (int8)

each directory with its text encoder, VAE and config.json. `t2v --model ROOT` runs it. Its videos are coloured
noise: finite, not flat, and different for each seed and prompt.
"""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from runtime.checkpoint.convert import Recipe, write_config, write_layout
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE, VAEConfig

PROMPTS = (
    "A man with short gray hair plays a red electric guitar.",
    "A red fox runs in the snow at night.",
)
WORDS = sorted({word for prompt in PROMPTS for word in re.findall(r"\w+|\.", prompt.lower())})
TRANSFORMER = TransformerConfig(128, 256, num_heads=1, num_layers=2, text_dim=64)
TEXT_ENCODER = TextEncoderConfig(32, dim=64, dim_attn=64, dim_ffn=128, num_heads=2, num_layers=2)
VAE_SIZES = VAEConfig(base_dim=8)
Variant = Literal["bf16", "fp8", "int8"]
SMALL = {"height": 32, "width": 48, "frames": 5}
"""A video of two latent frames of 4x6, for requests in tests."""


def build(root: Path, variants: tuple[Variant, ...] = ("bf16", "fp8", "int8"), seed: int = 20) -> Path:
    """Write the checkpoint below `root`, the same tensors in each variant; returns `root`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Transformer(TRANSFORMER).state_dict()
        text_encoder = TextEncoder(TEXT_ENCODER).state_dict()
        vae = VAE(VAE_SIZES).state_dict()
    save_tokenizer(root / "google" / "umt5-xxl" / "tokenizer.json")
    for variant in variants:
        directory = root / ("distill_models" if variant == "bf16" else f"distill_{variant}")
        directory.mkdir(parents=True)
        if variant == "bf16":
            file = directory / "distill_model.safetensors"
            write_layout(file, transformer, Recipe("transformer", variant), "single")
        else:
            write_layout(directory, transformer, Recipe("transformer", variant), "blocks")
        file = directory / f"models_t5_umt5-xxl-enc-{variant}.pth"
        write_layout(file, text_encoder, Recipe("text_encoder", variant), "pickle")
        full = Recipe("vae", "fp32", other_dtype=torch.float32)
        write_layout(directory / "Wan2.1_VAE.pth", vae, full, "pickle")
        write_config(directory, asdict(TRANSFORMER))
    return root


def save_tokenizer(path: Path) -> None:
    """A word-level tokenizer with umT5's special ids: padding 0, end 1, unknown 2."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(special)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
