"""Time and memory of the full-size models on this card, with random weights of the true shapes.

    python -m tests.gpu.measure [--height 480] [--width 832] [--frames 81]

One forward of the transformer in each format, the text states of 512 tokens, one decode: medians after a
warm-up, in one process, with the peak that torch reserved. Random weights run as fast as trained
ones. Compare inside one run: a card at its power limit changes its clocks.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from runtime.linear import LINEAR_CLASSES, QuantizedLinear, swap_linears
from runtime.linear.quantize import FORMATS, quantize_weight
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE, VAEConfig

DIT = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
UMT5 = TextEncoderConfig(256384, 4096, 4096, 10240, 64, 24)
MATRICES = ("self_attn", "cross_attn", ".attn.", "ffn")


def random_model(build: Callable[[], nn.Module], quantization: str) -> nn.Module:
    """The model on the card in bf16, its block matrices in `quantization`; random, never zero."""
    with torch.device("meta"):
        model = build()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and any(m in name for m in MATRICES)
    ]
    if quantization in LINEAR_CLASSES:
        swap_linears(model, dict.fromkeys(names, quantization))
    keep = getattr(model, "FP32_PARAMETERS", ())
    for module_name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = torch.randn(module.out_features, module.in_features, device="cuda", dtype=torch.bfloat16)
            module.weight, module.weight_scale = quantize_weight(
                weight * module.in_features**-0.5, FORMATS[quantization]
            )
            module.bias = (
                None if module.bias is None else 0.02 * torch.randn(module.out_features, device="cuda")
            )
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            fp32 = any(part in f"{module_name}.{leaf}" for part in keep)
            noise = torch.randn(
                parameter.shape, device="cuda", dtype=torch.float32 if fp32 else torch.bfloat16
            )
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            value = noise * scale + (1.0 if parameter.ndim == 1 and leaf == "weight" else 0.0)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    return model.eval()


def measure(label: str, run: Callable[[], object], repeats: int) -> None:
    """Print the median, the spread and the peak of `run`, after one warm-up."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
    timed = seconds[1:]
    allocated, reserved = (
        peak() / 2**30 for peak in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    )
    spread = f"{min(timed):.3f} to {max(timed):.3f}"
    memory = f"{allocated:.1f} ({reserved:.1f})"
    print(
        f"| {label} | {statistics.median(timed):.3f} | {spread} | {seconds[0]:.2f} | {memory} |", flush=True
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    size = f"{given.height}x{given.width}x{given.frames}"
    shape = (1, 16, (given.frames - 1) // 4 + 1, given.height // 8, given.width // 8)
    latents = torch.randn(shape, device="cuda")
    states = torch.randn(1, 512, 4096, device="cuda")
    time = torch.tensor([937.5], device="cuda")
    ids = torch.randint(2, 256384, (1, 512), device="cuda")
    mask = torch.ones_like(ids, dtype=torch.bool)
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, {size}, random weights of the true shapes\n")
    print(
        "| what | seconds (median) | spread | first | peak GiB allocated (reserved) |\n|---|---|---|---|---|"
    )
    for quantization in ("fp8", "int8", "bf16"):
        dit = random_model(lambda: Transformer(DIT), quantization)
        measure(f"one denoise forward, {quantization}", partial(dit, latents, time, states), given.repeats)
        del dit
    encoder = random_model(lambda: TextEncoder(UMT5), "bf16")
    measure("text states, 512 tokens, bf16", partial(encoder, ids, mask), given.repeats)
    del encoder
    vae = random_model(lambda: VAE(VAEConfig()), "bf16")
    assert isinstance(vae, VAE)
    measure("decode, bf16", partial(decode_all, vae, latents), given.repeats)


def decode_all(vae: VAE, latents: torch.Tensor) -> None:
    """Decode chunk by chunk, as the pipeline does, keeping nothing."""
    for _ in vae.decode_chunks(latents):
        pass


if __name__ == "__main__":
    main()
