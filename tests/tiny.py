"""A tiny random checkpoint in the published layout: the engine's real classes, a megabyte, a second to make.

    root/google/umt5-xxl/tokenizer.json
    root/distill_models/   distill_model.safetensors, one file                        (bf16)
    root/distill_fp8/      block_N.safetensors, non_block.safetensors, an index       (fp8)
    root/distill_int8/     the same                                                   (int8)

each directory with its text encoder, VAE and config.json. `t2v --model ROOT` runs it. Its videos are coloured
noise: finite, not flat, and different for each seed and prompt.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from runtime.linear.quantize import FORMATS, quantize_rows
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE, VAEConfig

WORDS = "a an the man with short gray hair plays red electric guitar fox runs in snow at night .".split()
TRANSFORMER = TransformerConfig(128, 256, num_heads=1, num_layers=2, text_dim=64)
TEXT_ENCODER = TextEncoderConfig(32, dim=64, dim_attn=64, dim_ffn=128, num_heads=2, num_layers=2)
VAE_SIZES = VAEConfig(base_dim=8)
SMALL = {"height": 32, "width": 48, "frames": 5}
"""A video of two latent frames of 4x6, for requests in tests."""

MATRICES = {
    "transformer": ("self_attn.", "cross_attn.", "ffn."),
    "text_encoder": (".attn.", ".ffn."),
}


def build(root: Path, variants: tuple[str, ...] = ("bf16", "fp8", "int8"), seed: int = 20) -> Path:
    """Write the checkpoint below `root`, the same tensors in each variant; returns `root`."""
    torch.manual_seed(seed)
    parts = {
        "transformer": state(Transformer(TRANSFORMER)),
        "text_encoder": state(TextEncoder(TEXT_ENCODER)),
        "vae": state(VAE(VAE_SIZES), torch.float32),
    }
    save_tokenizer(root / "google" / "umt5-xxl" / "tokenizer.json")
    for variant in variants:
        directory = root / {"bf16": "distill_models"}.get(variant, f"distill_{variant}")
        directory.mkdir(parents=True)
        transformer = eight_bit("transformer", parts["transformer"], variant)
        if variant == "bf16":
            save_file(transformer, directory / "distill_model.safetensors")
        else:
            save_blocks(transformer, directory)
        text_encoder = eight_bit("text_encoder", parts["text_encoder"], variant)
        torch.save(text_encoder, directory / f"models_t5_umt5-xxl-enc-{variant}.pth")
        torch.save(parts["vae"], directory / "Wan2.1_VAE.pth")
        (directory / "config.json").write_text(json.dumps(config_json(), indent=1))
    return root


def state(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A model's tensors as its file has them."""
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}


def eight_bit(part: str, tensors: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """The matrices of the blocks as `variant` stores them, each with its scales; the rest as it is."""
    if variant == "bf16":
        return tensors
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        marks = MATRICES[part]
        if name.startswith("blocks.") and tensor.ndim == 2 and any(mark in name for mark in marks):
            stored[name], stored[f"{name}_scale"] = quantize_rows(tensor.float(), FORMATS[variant])
        else:
            stored[name] = tensor
    return stored


def save_blocks(tensors: dict[str, Tensor], directory: Path) -> None:
    """One file for each block and one for the rest, with the index that names them."""
    places = {
        name: f"block_{name.split('.')[1]}.safetensors"
        if name.startswith("blocks.")
        else "non_block.safetensors"
        for name in tensors
    }
    for file in sorted(set(places.values())):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, directory / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


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


def config_json() -> dict[str, object]:
    """The transformer's config as the published directories carry it."""
    sizes = TRANSFORMER
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": sizes.dim,
        "ffn_dim": sizes.ffn_dim,
        "num_heads": sizes.num_heads,
        "num_layers": sizes.num_layers,
        "in_dim": sizes.in_dim,
        "out_dim": sizes.out_dim,
        "freq_dim": sizes.freq_dim,
        "text_len": sizes.text_len,
        "eps": sizes.eps,
    }
