"""Write the demo checkpoint in the layout in which the real one is published.

Wan2.1_VAE.pth  google/umt5-xxl/tokenizer.json  config.json       shared by the three variants
distill_models/   distill_model.safetensors  models_t5_umt5-xxl-enc-bf16.pth  config.json
distill_fp8/      block_N.safetensors  non_block.safetensors  *.index.json  models_t5_umt5-xxl-enc-fp8.pth
distill_int8/     the same in int8
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from demo.sampling import is_quantized
from demo.tokenizer import save_tokenizer
from demo.train_transformer import Generator
from runtime.linear.quantize import FORMATS, quantize_weight
from runtime.vae import VAE

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def export(model: Generator, vae: VAE, out: Path) -> int:
    """Write all files under `out`; returns their size in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(out)
    torch.save(_bf16(vae), out / "Wan2.1_VAE.pth")
    transformer, text = _bf16(model.transformer), _bf16(model.text_encoder)
    config = json.dumps(wan_config(model), indent=2) + "\n"
    (out / "config.json").write_text(config)
    for variant in ("models", "fp8", "int8"):
        folder = out / f"distill_{variant}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(config)
        if variant == "models":
            save_file(transformer, folder / "distill_model.safetensors", metadata={"format": "pt"})
            torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
        else:
            _write_blocks(_quantized(transformer, variant), folder)
            torch.save(_quantized(text, variant), folder / f"models_t5_umt5-xxl-enc-{variant}.pth")
    files = [path for path in out.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes for its owner alone
    return sum(path.stat().st_size for path in files)


def wan_config(model: Generator) -> dict[str, str | int | float]:
    """The keys of the published config.json."""
    sizes = model.transformer.config
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": sizes.dim,
        "eps": sizes.eps,
        "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim,
        "in_dim": sizes.in_dim,
        "model_type": "t2v",
        "num_heads": sizes.num_heads,
        "num_layers": sizes.num_layers,
        "out_dim": sizes.out_dim,
        "text_len": sizes.text_len,
    }


def _bf16(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in module.state_dict().items()
    }


def _quantized(weights: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """Block matrices in eight bits with an fp32 scale for each output row; the rest as it is."""
    out = {}
    for name, value in weights.items():
        if is_quantized(name):
            out[name], scale = quantize_weight(value, FORMATS[variant])
            out[f"{name}_scale"] = scale
        else:
            out[name] = value
    return out


def _write_blocks(weights: dict[str, Tensor], folder: Path) -> None:
    """One file for each block, one for everything else, and the index that says what is where."""
    files: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        part = f"block_{name.split('.')[1]}" if name.startswith("blocks.") else "non_block"
        files.setdefault(f"{part}.safetensors", {})[name] = value.contiguous()
    total = 0
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += (folder / file).stat().st_size
    places = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
