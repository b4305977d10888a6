"""What does not belong in a slot is refused before anything is loaded, by a sentence that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.checkpoint import expect_quantization, open_checkpoint
from runtime.checkpoint.convert import Recipe, quantize_state_dict
from runtime.checkpoint.names import Kind
from runtime.errors import WeightsError
from tests.unit.checkpoint_fixtures import tensors_of

Change = Callable[[dict[str, Tensor]], Any]
LINEAR = "blocks.1.ffn.0"


def saved(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


def lora(t: dict[str, Tensor]) -> None:
    t.clear()
    t[f"diffusion_model.{LINEAR}.lora_down.weight"] = torch.randn(4, 8)
    t["diffusion_model.blocks.1.diff_m"] = torch.randn(1, 6, 8)


STRANGERS: dict[str, tuple[Change, str]] = {
    "image-to-video by its embedding": (
        lambda t: t.update({"img_emb.proj.0.weight": torch.randn(4)}),
        "image-to-video",
    ),
    "image-to-video by its attention": (
        lambda t: t.update({"blocks.0.cross_attn.k_img.weight": torch.randn(4, 4)}),
        "image-to-video",
    ),
    "VACE": (lambda t: t.update({"vace_blocks.0.after_proj.weight": torch.randn(4)}), "VACE"),
    "LoRA": (lora, "LoRA"),
    "CLIP": (lambda t: (t.clear(), t.update({"visual.transformer.0.weight": torch.randn(4)})), "CLIP"),
    "TAEHV": (lambda t: (t.clear(), t.update({"decoder.1.weight": torch.randn(4)})), "tiny autoencoder"),
    "unknown": (
        lambda t: (t.clear(), t.update({"layer.weight": torch.randn(4)})),
        r"not known.*layer\.weight",
    ),
    "nothing": (lambda t: t.clear(), "not known"),
}


@pytest.mark.parametrize(("change", "said"), STRANGERS.values(), ids=STRANGERS.keys())
def test_another_family_is_named(tmp_path: Path, change: Change, said: str) -> None:
    tensors = tensors_of("transformer", seed=31)
    change(tensors)
    with pytest.raises(WeightsError, match=rf"model\.safetensors.*{said}.*expected a Wan transformer"):
        open_checkpoint(saved(tmp_path, tensors), "transformer")


@pytest.mark.parametrize("given", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("slot", ["transformer", "text_encoder", "vae"])
def test_every_kind_fits_its_own_slot_only(tmp_path: Path, given: Kind, slot: Kind) -> None:
    looks = {"transformer": "a Wan transformer", "text_encoder": "a umT5 text encoder", "vae": "a Wan VAE"}
    path = saved(tmp_path, tensors_of(given, seed=32))
    if given == slot:
        assert open_checkpoint(path, slot).kind == slot
        return
    with pytest.raises(WeightsError, match=f"looks like {looks[given]}; expected {looks[slot]}"):
        open_checkpoint(path, slot)
    with pytest.raises(WeightsError, match=r"holds no .*found: model\.safetensors"):
        open_checkpoint(tmp_path, slot)


@pytest.mark.parametrize(("channels", "said"), [(36, "image-to-video"), (48, "Wan2.2")])
def test_other_input_channels_are_named(tmp_path: Path, channels: int, said: str) -> None:
    tensors = tensors_of("transformer", seed=33)
    tensors["patch_embedding.weight"] = torch.randn(128, channels, 1, 2, 2)
    with pytest.raises(WeightsError, match=rf"{said}.*\({channels} input channels\)"):
        open_checkpoint(saved(tmp_path, tensors), "transformer").sizes()


def put(name: str, tensor: Tensor) -> Change:
    return lambda t: t.update({name: tensor})


FORMATS: dict[str, tuple[Change, str]] = {
    "no scale": (lambda t: t.pop(f"{LINEAR}.weight_scale"), rf"{LINEAR}\.weight is fp8 without a scale"),
    "block scales": (put(f"{LINEAR}.weight_scale", torch.rand(2, 1)), "expected .160, 1."),
    "128x128 scales": (
        put(f"{LINEAR}.weight_scale", torch.rand(2, 2)),
        "128x128 block scales are not supported",
    ),
    "inverse block scales": (put(f"{LINEAR}.weight_scale_inv", torch.rand(2, 2)), "128x128"),
    "scale dtype": (
        put(f"{LINEAR}.weight_scale", torch.ones(160, 1, dtype=torch.float64)),
        "scale.*has dtype float64",
    ),
    "both scales": (put(f"{LINEAR}.scale_weight", torch.rand(())), "twice"),
    "scale of nothing": (
        put("blocks.1.ffn.9.weight_scale", torch.rand(4, 1)),
        "ffn.9.weight_scale belongs to no weight",
    ),
    "scale of a bf16 weight": (
        put(f"{LINEAR}.weight", torch.randn(160, 128).bfloat16()),
        f"{LINEAR}.weight_scale belongs to a weight of dtype bfloat16",
    ),
    "nvfp4": (put(f"{LINEAR}.weight_global_scale", torch.rand(())), "NVFP4"),
    "packed": (put("blocks.1.ffn.2.bias", torch.ones(4, dtype=torch.uint8)), "dtype uint8: packed"),
    "e5m2": (put(f"{LINEAR}.weight", torch.randn(160, 128).to(torch.float8_e5m2)), "float8_e5m2"),
    "fp8 vector": (put("blocks.1.norm3.weight", torch.rand(128).to(torch.float8_e4m3fn)), "only matrices"),
    "mixed": (put(f"{LINEAR}.weight", torch.ones(160, 128, dtype=torch.int8)), "mixes fp8 and int8"),
    "comfy_quant": (put(f"{LINEAR}.comfy_quant", torch.ones(4, dtype=torch.uint8)), "comfy_quant"),
    "bitsandbytes": (put(f"{LINEAR}.weight.absmax", torch.rand(4)), "bitsandbytes"),
    "smoothing": (put(f"{LINEAR}.input_scale", torch.rand(128)), "scales activations per channel"),
}


@pytest.mark.parametrize(("change", "said"), FORMATS.values(), ids=FORMATS.keys())
def test_a_format_that_is_not_supported_is_named(tmp_path: Path, change: Change, said: str) -> None:
    tensors = quantize_state_dict(tensors_of("transformer", seed=34), Recipe("transformer", "fp8"))
    open_checkpoint(saved(tmp_path, tensors), "transformer")
    change(tensors)
    with pytest.raises(WeightsError, match=rf"model\.safetensors.*{said}"):
        open_checkpoint(saved(tmp_path, tensors), "transformer")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
def test_a_scale_that_is_no_number_is_named(tmp_path: Path, bad: float) -> None:
    tensors = quantize_state_dict(tensors_of("transformer", seed=35), Recipe("transformer", "int8"))
    tensors[f"{LINEAR}.weight_scale"][7] = bad
    checkpoint = open_checkpoint(saved(tmp_path, tensors), "transformer")
    with pytest.raises(WeightsError, match=rf"{LINEAR}\.weight_scale is negative or not finite"):
        checkpoint.read(f"{LINEAR}.weight_scale")


def test_raw_fp8_is_refused(tmp_path: Path) -> None:
    """A file that was cast to fp8 without scales looks like a checkpoint; its weights below 2^-9 are gone."""
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in tensors_of("transformer", seed=36).items()}
    with pytest.raises(WeightsError, match=r"is fp8 without a scale|only matrices"):
        open_checkpoint(saved(tmp_path, tensors), "transformer")


@pytest.mark.parametrize(
    ("form", "slot", "fits"),
    [
        ("fp8", "bf16", False),
        ("fp8", "fp8", True),
        ("int8", "fp8", False),
        ("int8", "int8", True),
        ("bf16", "int8", False),
    ],
)
def test_the_slot_asks_for_its_format(tmp_path: Path, form: Any, slot: Any, fits: bool) -> None:
    """The header decides, not the name: these are all called model.safetensors."""
    tensors = quantize_state_dict(tensors_of("transformer", seed=37), Recipe("transformer", form))
    checkpoint = open_checkpoint(saved(tmp_path, tensors), "transformer")
    if fits:
        expect_quantization(checkpoint, slot)
        return
    with pytest.raises(WeightsError, match=rf"model\.safetensors holds {form} .*expected {slot}"):
        expect_quantization(checkpoint, slot)


SHAPES: dict[str, tuple[Change, str]] = {
    "another width": (
        put("blocks.2.cross_attn.k.weight", torch.randn(128, 96)),
        r"cross_attn\.k.*expected dim = 128",
    ),
    "another ffn": (put("blocks.1.ffn.2.weight", torch.randn(128, 96)), r"ffn\.2.*expected ffn_dim = 160"),
    "no multiple": (put("head.head.weight", torch.randn(63, 128)), r"head\.head.*expected 4\*out_dim"),
    "another patch": (
        put("patch_embedding.weight", torch.randn(128, 16, 2, 2, 2)),
        "patch_embedding.*expected .dim",
    ),
    "two dimensions": (
        put("patch_embedding.weight", torch.randn(128, 64)),
        "patch_embedding.*expected 5 dimensions",
    ),
    "no heads of 128": (
        lambda t: t.update(
            {
                n: torch.randn(tuple(96 if s == 128 else 576 if s == 768 else s for s in x.shape))
                for n, x in t.items()
            }
        ),
        "dim 96, expected a multiple of 128",
    ),
    "a gap": (lambda t: [t.pop(n) for n in list(t) if n.startswith("blocks.1.")], "no tensor of block 1 "),
    "no block": (lambda t: [t.pop(n) for n in list(t) if n.startswith("blocks.")], "no tensor of any block"),
    "no patch embedding": (lambda t: t.pop("patch_embedding.weight"), r"no tensor patch_embedding\.weight"),
}


@pytest.mark.parametrize(("change", "said"), SHAPES.values(), ids=SHAPES.keys())
def test_shapes_that_contradict_each_other_are_named(tmp_path: Path, change: Change, said: str) -> None:
    tensors = tensors_of("transformer", seed=38)
    change(tensors)
    checkpoint = open_checkpoint(saved(tmp_path, tensors), "transformer")
    with pytest.raises(WeightsError, match=said):
        checkpoint.sizes()


CONFIGS: dict[str, tuple[str, str | None]] = {
    "agrees": (json.dumps({"dim": 128, "ffn_dim": 160, "eps": 1e-6, "text_len": 512}), None),
    "diffusers words": (json.dumps({"num_attention_heads": 1, "ffn_dim": 160, "in_channels": 16}), None),
    "of another part": (json.dumps({"d_model": 7, "num_layers": 99}), None),
    "another size": (
        json.dumps({"dim": 5120, "ffn_dim": 13824}),
        "config.json says dim 5120, the tensors 128",
    ),
    "another task": (json.dumps({"model_type": "i2v", "ffn_dim": 160}), "model_type 'i2v'"),
    "no number": (json.dumps({"ffn_dim": 160, "text_len": "512"}), "text_len '512'"),
    "a fraction": (json.dumps({"ffn_dim": 160, "text_len": 8.5}), "text_len 8.5"),
    "no JSON": ("{", "config.json is not JSON"),
}


@pytest.mark.parametrize(("text", "said"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_beside_the_weights_must_agree(tmp_path: Path, text: str, said: str | None) -> None:
    (tmp_path / "config.json").write_text(text)
    checkpoint = open_checkpoint(saved(tmp_path, tensors_of("transformer", seed=39)), "transformer")
    if said is None:
        sizes = checkpoint.sizes()
        assert sizes["dim"] == 128 and sizes["num_layers"] == 3
        assert sizes.get("text_len") == json.loads(text).get("text_len")
        return
    with pytest.raises(WeightsError, match=said):
        checkpoint.sizes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.safetensors", "does not exist"),
        ("x.gguf", "GGUF"),
        ("x.onnx", "unknown ending"),
        (".", "no weight file"),
    ],
)
def test_a_path_of_another_kind_is_named(tmp_path: Path, name: str, said: str) -> None:
    if name.startswith("x"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=said):
        open_checkpoint(tmp_path / name, "transformer")
