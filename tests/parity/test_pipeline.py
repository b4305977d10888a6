"""The whole path, prompt to 8-bit frames, against a loop of diffusers' and transformers' own parts."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import UMT5Config, UMT5EncoderModel

from runtime.checkpoint.names import from_canonical
from runtime.parts import Parts
from runtime.pipeline import Pipeline
from runtime.profiles import load_manifest, load_profile
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.tokenizer import PromptTokenizer
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE, VAEConfig

TEXT_LEN, TEXT_DIM = 24, 32
PROMPT = "a red  circle &amp; a blue square"
NEGATIVE = "blue square"


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random everything: a norm weight left at one or a bias left at zero would hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = (parameter.ndim == 1 and name.endswith("weight")) or "gamma" in name
        fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 1
        parameter.data = (
            1 + 0.1 * noise if is_norm else noise * (fan_in**-0.5 if parameter.ndim > 1 else 0.05)
        )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "blue", "square", "&"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    text_encoder = TextEncoder(TextEncoderConfig(16, TEXT_DIM, 48, 64, 3, 2))
    transformer = Transformer(TransformerConfig(64, 96, 2, 2, text_dim=TEXT_DIM, text_len=TEXT_LEN))
    vae = VAE(VAEConfig(base_dim=8))
    for seed, model in enumerate((text_encoder, transformer, vae)):
        randomise(model, seed)
        model.eval().requires_grad_(False)
    manifest = load_manifest("demo").model_copy(
        update={"transformer": None, "text_encoder": None, "vae": None, "quantization": None}
    )
    tokenize = PromptTokenizer(path, max_length=TEXT_LEN)
    parts = Parts(text_encoder, transformer, vae, "cpu")
    return Pipeline(manifest, load_profile("cpu"), "cpu", tokenize, parts)


def foreign_state(kind: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    names = from_canonical(kind, state)  # type: ignore[arg-type]
    return {names[name]: tensor for name, tensor in state.items()}


@torch.inference_mode()
def reference_video(
    pipe: Pipeline, sampler: str, seed: int, height: int, width: int, frames: int, guidance: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and frames in [-1, 1] by the reference libraries alone."""
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=16, d_model=TEXT_DIM, d_kv=16, d_ff=64, num_layers=2, num_heads=3, dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
    state = foreign_state("text_encoder", pipe.parts.whole_text_encoder)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    encoder.load_state_dict(state)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, text_dim=TEXT_DIM, ffn_dim=96, num_layers=2
    ).eval()  # fmt: skip
    transformer.load_state_dict(foreign_state("transformer", pipe.parts.transformer))
    vae = AutoencoderKLWan(base_dim=8).eval()
    vae.load_state_dict(foreign_state("vae", pipe.parts.whole_vae))

    ids = torch.tensor([[3, 4, 5, 8, 3, 6, 7, 1] + [0] * (TEXT_LEN - 8)])
    mask = (ids != 0).long()
    states = encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]
    negative_ids = torch.tensor([[6, 7, 1] + [0] * (TEXT_LEN - 3)])  # NEGATIVE
    mask = (negative_ids != 0).long()
    negative_states = encoder(negative_ids, attention_mask=mask).last_hidden_state * mask[..., None]

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.9375, 0.8333333134651184, 0.625])
    generator = torch.Generator().manual_seed(seed)
    shape = (16, (frames - 1) // 4 + 1, height // 8, width // 8)
    latents = torch.randn(shape, generator=generator)[None]
    for i, t in enumerate(scheduler.timesteps):
        velocity = transformer(latents, t[None], states).sample
        if guidance != 1:
            away = transformer(latents, t[None], negative_states).sample
            velocity = away + guidance * (velocity - away)
        if sampler == "euler":
            latents = scheduler.step(velocity, t, latents).prev_sample
        else:
            now, later = scheduler.sigmas[i], scheduler.sigmas[i + 1]
            latents = latents - now * velocity
            if later > 0:
                latents = (1 - later) * latents + later * torch.randn(shape, generator=generator)[None]
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    return latents, vae.decode(latents * std + mean).sample.clamp(-1, 1)


@pytest.mark.parametrize("sampler", ["lcm", "euler"])
@pytest.mark.parametrize(("height", "width", "frames"), [(32, 48, 1), (48, 32, 9)])
def test_pipeline_equals_the_reference_parts(
    pipeline: Pipeline, sampler: str, height: int, width: int, frames: int
) -> None:
    seed = 7 + frames
    states = []
    video = pipeline(
        PROMPT, seed=seed, height=height, width=width, num_frames=frames, sampler=sampler,
        on_stage=lambda stage: states.append(stage.latents) if stage.latents is not None else None,
    )  # fmt: skip
    latents, decoded = reference_video(pipeline, sampler, seed, height, width, frames)
    distance = float((states[-1] - latents[0]).abs().max() / latents.abs().max())
    pixels = ((decoded[0].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy()
    steps = np.abs(video.frames.astype(np.float32) - pixels)
    where = f"{sampler} {height}x{width}x{frames}"
    print(f"{where}: latents max diff {distance:.2e}, pixels {steps.max():.0f} of 255")
    assert len(states) == 4
    assert distance <= 1e-3
    assert video.frames.shape == (frames, height, width, 3) and video.frames.dtype == np.uint8
    assert (
        steps.max() <= 1 and (steps > 0).mean() < 0.01
    )  # only values that lie on a rounding edge may differ
    assert video.frames.std() > 1


def test_guidance_equals_the_reference_parts(pipeline: Pipeline) -> None:
    """Of a model that is not distilled: two forwards a step, away from the negative prompt."""
    plain = pipeline.manifest.sampling.model_copy(update={"distilled": False, "guidance": 5.0})
    pipe = copy.copy(pipeline)
    pipe.manifest = pipeline.manifest.model_copy(update={"sampling": plain})
    states = []
    pipe(
        PROMPT, negative_prompt=NEGATIVE, seed=4, height=32, width=48, num_frames=5, sampler="euler",
        on_stage=lambda stage: states.append(stage.latents) if stage.latents is not None else None,
    )  # fmt: skip
    expected, _ = reference_video(pipe, "euler", 4, 32, 48, 5, guidance=5.0)
    unguided, _ = reference_video(pipe, "euler", 4, 32, 48, 5)
    distance = float((states[-1] - expected[0]).abs().max() / expected.abs().max())
    print(f"guidance 5: latents max diff {distance:.2e}")
    assert distance <= 1e-3
    assert not torch.allclose(expected, unguided, atol=0.1)


def test_frames_equal_the_reference_before_rounding(pipeline: Pipeline) -> None:
    latents, decoded = reference_video(pipeline, "euler", 3, 32, 32, 5)
    ours = pipeline.parts.whole_vae.decode(latents)
    distance = float((ours - decoded).abs().max())
    print(f"frames in [-1, 1]: max diff {distance:.2e}")
    assert distance <= 1e-3


def test_metadata_tells_how_to_make_it_again(pipeline: Pipeline, tmp_path: Path) -> None:
    from runtime.video import read_metadata

    video = pipeline(PROMPT, seed=3, height=32, width=32, num_frames=5)
    told = read_metadata(video.save(tmp_path / "video.mp4"))
    assert told["prompt"] == PROMPT and told["seed"] == 3 and told["sampler"] == "lcm" and told["steps"] == 4
    assert (told["height"], told["width"], told["frames"]) == (32, 32, 5)
    assert told["model"] == "demo" and set(told["timings"]) >= {"text", "denoise", "decode"}
    again = pipeline(told["prompt"], seed=told["seed"], height=32, width=32, num_frames=5)
    assert np.array_equal(again.frames, video.frames)
