"""Score a model in memory, in batches, in each number format: what training prints at its end.

`demo.evaluate` does the same through the shipped files and the public pipeline, one video at a time.
"""

import copy

import torch
from torch import Tensor, nn

from demo.scenes import HELD_OUT_SCENES, Scene, held_out_phrase
from demo.score import score_video, shares
from demo.tokenizer import build_tokenizer
from demo.train_transformer import LATENT_SHAPE, TEXT_LEN, Generator
from runtime.linear import LINEAR_CLASSES, swap_linears
from runtime.linear.quantize import FORMATS, quantize_weight
from runtime.sampler import denoise, schedule
from runtime.transformer import Transformer
from runtime.vae import VAE

BATCH = 48


def is_quantized(name: str) -> bool:
    """Whether the published files keep this tensor in eight bits: the matrices inside blocks."""
    inner = name.startswith("blocks.") and name.endswith(".weight")
    return (
        inner
        and any(f".{part}." in name for part in ("self_attn", "cross_attn", "attn", "ffn"))
        and ("norm" not in name)
    )


def cast(model: Generator) -> Generator:
    """A copy as the bf16 files hold it: bf16 but for the transformer's sensitive parameters."""
    copied = copy.deepcopy(model).eval()
    copied.text_encoder.bfloat16()
    for name, parameter in copied.transformer.named_parameters():
        rounded = parameter.data.bfloat16()
        sensitive = any(part in name for part in Transformer.FP32_PARAMETERS)
        parameter.data = rounded.float() if sensitive else rounded
    return copied


@torch.no_grad()
def quantize(model: Generator, form: str) -> Generator:
    """A bf16 copy whose block matrices are in `form` (fp8 or int8), activations quantized per token."""
    copied = cast(model)
    for network in (copied.text_encoder, copied.transformer):
        linears = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and is_quantized(f"{name}.weight")
        }
        swap_linears(network, dict.fromkeys(linears, form))
        for name, linear in linears.items():
            replaced = network.get_submodule(name)
            assert isinstance(replaced, LINEAR_CLASSES[form])
            replaced.weight, replaced.weight_scale = quantize_weight(linear.weight, FORMATS[form])
            replaced.bias = None if linear.bias is None else linear.bias.detach()
    return copied


@torch.inference_mode()
def make_videos(
    model: Generator, vae: VAE, prompts: list[str], sampler: str, steps: int, generator: torch.Generator
) -> Tensor:
    """Frames (B, F, H, W, 3) in 0..1 of a batch of prompts, on the generator's device."""
    tokenizer, device = build_tokenizer(), generator.device
    rows = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    ids = torch.tensor([row + [0] * (TEXT_LEN - len(row)) for row in rows], device=device)
    states = model.text_states(ids)

    def velocity_of(latents: Tensor, time: float) -> Tensor:
        return model.transformer(latents, torch.full((len(prompts),), time, device=device), states)

    noise = torch.randn(len(prompts), *LATENT_SHAPE, generator=generator, device=device)
    for latents in denoise(velocity_of, noise, schedule(steps), sampler, generator):
        final = latents
    decoded = torch.cat([vae.decode(part, chunked=False) for part in final.split(12)])
    return ((decoded + 1) / 2).permute(0, 2, 3, 4, 1)


def score_model(
    model: Generator,
    vae: VAE,
    sampler: str,
    device: torch.device,
    *,
    repeats: int = 8,
    steps: int = 4,
    unseen_phrasing: bool = False,
    scenes: tuple[Scene, ...] = HELD_OUT_SCENES,
) -> dict[str, float]:
    """Shares of right attributes over held-out scenes, `repeats` draws of noise each."""
    generator = torch.Generator(device).manual_seed(1234)
    asked = list(scenes) * repeats
    results = []
    for i in range(0, len(asked), BATCH):
        some = asked[i : i + BATCH]
        prompts = [held_out_phrase(scene) if unseen_phrasing else scene.prompt() for scene in some]
        videos = make_videos(model, vae, prompts, sampler, steps, generator)
        results += [score_video(video, scene) for video, scene in zip(videos, some, strict=True)]
    return shares(results)


def score_table(
    model: Generator, vae: VAE, device: torch.device, repeats: int = 8
) -> dict[str, dict[str, float]]:
    """The rows of the documentation's table."""
    vae = copy.deepcopy(vae).bfloat16()
    variants = {"bf16": cast(model), "fp8": quantize(model, "fp8"), "int8": quantize(model, "int8")}
    rows = {}
    for name, variant in variants.items():
        for sampler in ("lcm", "euler"):
            rows[f"{name} {sampler}"] = score_model(variant, vae, sampler, device, repeats=repeats)
    plain = variants["bf16"]
    for sampler in ("lcm", "euler"):
        rows[f"bf16 {sampler}, unseen phrasing"] = score_model(
            plain, vae, sampler, device, repeats=repeats, unseen_phrasing=True
        )
    for steps in (1, 2, 8):
        rows[f"bf16 lcm, {steps} steps"] = score_model(
            plain, vae, "lcm", device, repeats=repeats // 2 or 1, steps=steps
        )
    return rows
