"""Full-width, few-layer models on a card, in each published format, against the fp32 reference.

    python -m pytest tests/gpu -m gpu -s

The reference is the same code in fp32, which tests/parity holds to diffusers and transformers. Of a quantized
format two distances are printed: to the model with the original weights (what a user gets), and to the model
with the weights as the file holds them (what quantized activations and bf16 add).
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from runtime.checkpoint import load_weights, open_checkpoint
from runtime.checkpoint.convert import Recipe, write_layout
from runtime.kernels import launch
from runtime.linear import swap_linears
from runtime.linear.quantize import dequantize
from runtime.text_encoder import TextEncoder, TextEncoderConfig
from runtime.transformer import Transformer, TransformerConfig
from runtime.vae import VAE, VAEConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]

WIDE = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=2)
SHAPES = [(1, 6, 10), (3, 18, 22), (5, 30, 52)]  # latent frames, rows, columns; 15, 297 and 1950 tokens
LIMITS = {"bf16": 0.02, "fp8": 0.08, "int8": 0.06}  # relative RMS, to the original weights


@pytest.fixture(autouse=True)
def exact_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random everything, at a scale that keeps activations near one."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cuda")
        if "modulation" in name:
            parameter.data = 0.3 * noise
        elif parameter.ndim > 1 and "gamma" not in name:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            is_scale = "gamma" in name or name.endswith("weight")
            parameter.data = 1 + 0.1 * noise if is_scale else 0.05 * noise
    return model.eval().requires_grad_(False)


def rms(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def reload(
    model_type: type[nn.Module], config: object, path: Path, kind: str, dtype: torch.dtype
) -> nn.Module:
    """The file on the card as the pipeline loads it."""
    checkpoint = open_checkpoint(path, kind)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = model_type(config)
    swap_linears(model, checkpoint.quantized_linears())
    fp32 = getattr(model_type, "FP32_PARAMETERS", ())
    load_weights(model, checkpoint, dtype=dtype, device="cuda", fp32_parameters=fp32)
    return model.eval()


def dequantized_copy(model: nn.Module, path: Path, kind: str) -> None:
    """Set the fp32 model's matrices to what the file's quantized ones stand for."""
    checkpoint = open_checkpoint(path, kind)  # type: ignore[arg-type]
    parameters = dict(model.named_parameters())
    for name in checkpoint.quantized_linears():
        weight, scale = (checkpoint.read(f"{name}.{leaf}").cuda() for leaf in ("weight", "weight_scale"))
        parameters[f"{name}.weight"].data = dequantize(weight, scale)


@pytest.mark.parametrize("quantization", ["bf16", "fp8", "int8"])
def test_transformer_forward(quantization: str, tmp_path: Path) -> None:
    with torch.device("cuda"):
        reference = randomise(Transformer(WIDE), seed=1)
    recipe = Recipe("transformer", quantization, other_dtype=torch.bfloat16)  # type: ignore[arg-type]
    write_layout(tmp_path / "model", reference.state_dict(), recipe, "blocks")
    model = reload(Transformer, WIDE, tmp_path / "model", "transformer", torch.bfloat16)

    inputs, expected = [], []
    generator = torch.Generator("cuda").manual_seed(2)
    for i, shape in enumerate(SHAPES):
        latents = torch.randn(1, 16, *shape, generator=generator, device="cuda")
        states = torch.randn(1, 512, 4096, generator=generator, device="cuda")
        states[:, 20 * (i + 1) :] = 0
        time = torch.tensor([[1000.0, 937.5, 625.0][i]], device="cuda")
        inputs.append((latents, time, states))
    with torch.inference_mode():
        expected = [reference(*given) for given in inputs]
        outputs = [model(*given) for given in inputs]
        dequantized_copy(reference, tmp_path / "model", "transformer")
        same_weights = [reference(*given) for given in inputs]
    for shape, ours, original, same in zip(SHAPES, outputs, expected, same_weights, strict=True):
        distance, added = rms(ours, original), rms(ours, same)
        where = f"transformer {quantization:5} {shape!s:13}"
        print(f"\n{where} rms to fp32 {distance:.2e}, to fp32 of the file's weights {added:.2e}")
        assert torch.isfinite(ours).all()
        assert 0 < distance <= LIMITS[quantization]
        assert added <= LIMITS[quantization]


@pytest.mark.parametrize("quantization", ["bf16", "fp8", "int8"])
def test_text_encoder_forward(quantization: str, tmp_path: Path) -> None:
    config = TextEncoderConfig(1000, 4096, 4096, 10240, 64, 2)
    with torch.device("cuda"):
        reference = randomise(TextEncoder(config), seed=3)
    for block in reference.blocks:
        block.attn.q.weight.mul_(0.15)  # scores are not scaled here: trained queries are this much smaller
    recipe = Recipe("text_encoder", quantization, other_dtype=torch.bfloat16)  # type: ignore[arg-type]
    write_layout(tmp_path / "t5.pth", reference.state_dict(), recipe, "pickle")
    model = reload(TextEncoder, config, tmp_path / "t5.pth", "text_encoder", torch.bfloat16)
    for length in (3, 40, 512):
        ids = torch.randint(2, 1000, (1, length), device="cuda")
        with torch.inference_mode():
            ours, expected = model(ids), reference(ids)
            with launch.twins():
                plain = model(ids)
        distance, twins = rms(ours, expected), rms(plain, expected)
        print(
            f"\ntext encoder {quantization:5} {length:4} tokens: rms to fp32 {distance:.2e}, "
            f"without kernels {twins:.2e}, between the two {rms(ours, plain):.2e}"
        )
        assert 0 < distance <= 3 * LIMITS[quantization]  # gate times value doubles an error
        assert distance <= 1.1 * twins


@pytest.mark.parametrize("length", [512, 77])
def test_a_layer_of_the_text_encoder_is_few_kernels(length: int, tmp_path: Path) -> None:
    """13 with torch's product in eight bits; its attention takes the biases as they are, in one kernel."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this card's products in eight bits take more kernels")
    counts, ids = [], torch.randint(2, 1000, (1, length), device="cuda")
    for layers in (1, 2):
        config = TextEncoderConfig(1000, 4096, 4096, 10240, 64, layers)
        with torch.device("cuda"):
            state = randomise(TextEncoder(config), seed=3).state_dict()
        recipe = Recipe("text_encoder", "fp8", other_dtype=torch.bfloat16)
        write_layout(tmp_path / f"t5-{layers}.pth", state, recipe, "pickle")
        model = reload(TextEncoder, config, tmp_path / f"t5-{layers}.pth", "text_encoder", torch.bfloat16)
        with torch.inference_mode():
            model(ids)  # kernels are compiled, ways found
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                model(ids)
                torch.cuda.synchronize()
        kernels = [one for one in profile.events() if one.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(Counter(one.name[:60] for one in kernels))
    layer = counts[1] - counts[0]
    print(f"\n{length} tokens, one layer:", *(f"  {n} {name}" for name, n in layer.items()), sep="\n")
    assert 10 <= layer.total() <= 15


def test_vae_decode_and_encode() -> None:
    with torch.device("cuda"):
        vae = randomise(VAE(VAEConfig()), seed=4)
    generator = torch.Generator("cuda").manual_seed(5)
    latents = torch.randn(1, 16, 3, 12, 20, generator=generator, device="cuda")
    with torch.inference_mode():
        chunked, whole = vae.decode(latents), vae.decode(latents, chunked=False)
        on_cpu = vae.cpu().decode(latents.cpu()).cuda()
        fast = vae.cuda().to(torch.bfloat16).decode(latents)
    print(
        f"\nvae: chunked to one-shot {float((chunked - whole).abs().max()):.2e}, "
        f"card to CPU {float((chunked - on_cpu).abs().max()):.2e}, bf16 rms {rms(fast, chunked):.2e}"
    )
    assert torch.allclose(chunked, whole, atol=1e-4)
    assert torch.allclose(chunked, on_cpu, atol=1e-3)
    assert 0 < rms(fast, chunked) <= 0.05
