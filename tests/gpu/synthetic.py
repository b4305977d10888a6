"""A full-size random checkpoint in the published layout, to run the whole program at its real size.

    python -m tests.gpu.synthetic DIRECTORY --model wan2.1-t2v-14b-4step-fp8
    t2v --weights DIRECTORY --model wan2.1-t2v-14b-4step-fp8

Names, shapes, dtypes and files are those that the manifest's repository has; the numbers are noise of a scale
at which activations stay near one, so the video is noise too. The tokenizer is the demo's.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.checkpoint.families import LINEARS
from runtime.checkpoint.names import Kind
from runtime.checkpoint.write import write_pickle, write_safetensors
from runtime.linear import swap_linears
from runtime.linear.quantize import FORMATS
from runtime.profiles import load_manifest
from runtime.schema import ModelManifest, project_root
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE, VAEConfig


def shapes(kind: Kind, model: nn.Module, quantization: str) -> dict[str, Tensor]:
    """Names, dtypes and shapes of the file, as tensors on meta."""
    if quantization in FORMATS:
        names = [name for name, _ in model.named_modules() if LINEARS[kind].fullmatch(name)]
        swap_linears(model, dict.fromkeys(names, quantization))
    return dict(model.state_dict())


def noise(name: str, like: Tensor, device: str) -> Tensor:
    """Random numbers for the tensor `name`, of the dtype and shape of `like`."""
    if like.dtype in (torch.float8_e4m3fn, torch.int8):
        return torch.randn(like.shape, device=device).mul_(40).round_().clamp_(-127, 127).to(like.dtype)
    values = torch.randn(like.shape, device=device)
    if name.endswith("weight_scale"):
        return (
            values.uniform_(0.9, 1.1) * 1e-2 / 40
        )  # rows of 5,000 to 14,000 entries with a deviation of .01
    if like.ndim > 1 and "gamma" not in name:
        return values * (0.1 if "modulation" in name else like[0].numel() ** -0.5)
    return 1 + 0.1 * values if name.endswith(("weight", "gamma")) or "gamma" in name else 0.02 * values


def write_blocks(target: Path, plan: dict[str, Tensor], device: str) -> None:
    """block_N.safetensors, non_block.safetensors and the index."""
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in plan.items():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        file = "non_block.safetensors" if block is None else f"block_{block}.safetensors"
        files.setdefault(file, {})[name] = tensor

    def made(part: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, like in part.items():
            yield name, noise(name, like, device).to(like.dtype)

    total = sum(write_safetensors(target / file, part, made(part)) for file, part in files.items())
    index = {name: file for file, part in files.items() for name in part}
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))


def write_checkpoint(directory: Path, manifest: ModelManifest, device: str) -> None:
    """All parts of `manifest` below `directory`."""
    assert manifest.transformer and manifest.text_encoder and manifest.vae and manifest.quantization
    target = directory / manifest.subdirectories[0]
    target.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig(**manifest.transformer.model_dump()))
        encoder = TextEncoder(TextEncoderConfig(**manifest.text_encoder.model_dump()))
        vae = VAE(VAEConfig(**manifest.vae.model_dump()))
    write_blocks(target, shapes("transformer", transformer, manifest.quantization), device)
    for file, kind, model in (
        (f"models_t5_umt5-xxl-enc-{manifest.quantization}.pth", "text_encoder", encoder.bfloat16()),
        ("Wan2.1_VAE.pth", "vae", vae),
    ):
        plan = shapes(kind, model, manifest.quantization if kind == "text_encoder" else "fp32")
        write_pickle(target / file, {n: noise(n, t, device).to(t.dtype).cpu() for n, t in plan.items()})
    tokenizer = Path("google/umt5-xxl/tokenizer.json")
    (directory / tokenizer).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(project_root() / "demo" / "weights" / tokenizer, directory / tokenizer)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="wan2.1-t2v-14b-4step-fp8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    write_checkpoint(given.directory, load_manifest(given.model), given.device)
    for file in sorted(given.directory.rglob("*")):
        if file.is_file() and not file.name.startswith("block_"):
            print(f"{file.stat().st_size / 1e9:8.3f} GB  {file}")


if __name__ == "__main__":
    main()
