"""Tiny random models as canonical tensors, for the tests of checkpoints: the real classes, fresh numbers."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE, VAEConfig

TRANSFORMER = TransformerConfig(128, 160, num_heads=1, num_layers=3, freq_dim=32, text_dim=48, text_len=8)
TEXT_ENCODER = TextEncoderConfig(40, dim=32, dim_attn=48, dim_ffn=64, num_heads=3, num_layers=2)
VAE_CONFIG = VAEConfig(base_dim=8)

EIGHT_BITS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
SCALE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def on_meta(kind: str) -> nn.Module:
    """The tiny model of a kind, without data."""
    with torch.device("meta"):
        if kind == "transformer":
            return Transformer(TRANSFORMER)
        return TextEncoder(TEXT_ENCODER) if kind == "text_encoder" else VAE(VAE_CONFIG)


def tensors_of(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random values for every tensor of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = on_meta(kind).state_dict()
    return {name: (torch.randn(t.shape, generator=generator) * 0.05).to(dtype) for name, t in shapes.items()}


def raw(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files under their stored names, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def header_of(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file."""
    data = path.read_bytes()
    return dict(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))


def replace_header(path: Path, header: dict[str, Any]) -> None:
    """Give the file another header; its data stay."""
    data = path.read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
