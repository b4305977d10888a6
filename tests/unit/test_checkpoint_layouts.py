"""Every published layout, format and scale dtype loads, and dequantizes to exactly weight * scale."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.checkpoint import Checkpoint, expect_quantization, find_component, open_checkpoint
from runtime.checkpoint.convert import Recipe, quantize_state_dict, write_config, write_layout
from runtime.checkpoint.names import Kind, from_canonical
from runtime.errors import WeightsError
from runtime.linear.quantize import dequantize
from tests.unit.checkpoint_fixtures import EIGHT_BITS, SCALE_DTYPES, raw, tensors_of

FILES = {"transformer": "distill_model.safetensors", "text_encoder": "t5.pth", "vae": "Wan2.1_VAE.pth"}


def check_exact(checkpoint: Checkpoint, stored: dict[str, Tensor], form: str) -> None:
    """Each quantized matrix of the checkpoint equals weight * scale of the file, evaluated in float64."""
    quantized = checkpoint.quantized_linears()
    assert set(quantized.values()) == {form} and checkpoint.quantization == form
    matrices = {
        name for name, t in stored.items() if t.dtype == EIGHT_BITS[form] and name.endswith(".weight")
    }
    assert {f"{module}.weight" for module in quantized} == matrices
    for module in quantized:
        weight, scale = checkpoint.read(f"{module}.weight"), checkpoint.read(f"{module}.weight_scale")
        assert (
            weight.dtype == EIGHT_BITS[form]
            and scale.dtype == torch.float32
            and scale.shape == (weight.shape[0], 1)
        )
        given = stored.get(f"{module}.weight_scale", stored.get(f"{module}.scale_weight"))
        assert given is not None
        exact = stored[f"{module}.weight"].double() * given.double().reshape(-1, 1)
        assert torch.equal(dequantize(weight, scale), exact.float())


def check_close(checkpoint: Checkpoint, source: dict[str, Tensor], form: str) -> None:
    """Dequantized matrices are near the source: about .9 % RMS for int8, 2.7 % for fp8 on Gaussian rows."""
    for module in checkpoint.quantized_linears():
        w = dequantize(checkpoint.read(f"{module}.weight"), checkpoint.read(f"{module}.weight_scale"))
        error = (w - source[f"{module}.weight"]).norm() / source[f"{module}.weight"].norm()
        assert error < {"fp8": 0.032, "int8": 0.012}[form]


@pytest.mark.parametrize("layout", ["blocks", "single"])
@pytest.mark.parametrize("scale", SCALE_DTYPES)
@pytest.mark.parametrize("form", EIGHT_BITS)
def test_transformer_layouts(tmp_path: Path, form: str, scale: str, layout: str) -> None:
    source = tensors_of("transformer", seed=11)
    recipe = Recipe("transformer", form, SCALE_DTYPES[scale])  # type: ignore[arg-type]
    target = tmp_path if layout == "blocks" else tmp_path / FILES["transformer"]
    files = write_layout(target, source, recipe, layout)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(target, "transformer")
    stored = raw([file for file in files if file.suffix == ".safetensors"])
    assert sum(name.endswith(".weight_scale") for name in stored) == 10 * 3
    assert {t.dtype for name, t in stored.items() if name.endswith("scale")} == {SCALE_DTYPES[scale]}
    check_exact(checkpoint, stored, form)
    check_close(checkpoint, source, form)
    assert checkpoint.nbytes == sum(t.nbytes for t in stored.values())
    assert checkpoint.files == tuple(sorted(file for file in files if file.suffix == ".safetensors"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["blocks", "single"])
def test_unquantized_layouts(tmp_path: Path, dtype: Any, layout: Any) -> None:
    source = tensors_of("transformer", seed=12)
    target = tmp_path if layout == "blocks" else tmp_path / FILES["transformer"]
    write_layout(target, source, Recipe("transformer", dtype, other_dtype=SCALE_DTYPES[dtype]), layout)
    checkpoint = open_checkpoint(target, "transformer")
    assert checkpoint.quantization == dtype and checkpoint.quantized_linears() == {}
    for name, tensor in source.items():
        assert torch.equal(checkpoint.read(name), tensor.to(SCALE_DTYPES[dtype]))
    expect_quantization(checkpoint, "bf16")  # the floating slot takes all three
    with pytest.raises(WeightsError, match=rf"holds {dtype} block matrices.*expected fp8"):
        expect_quantization(checkpoint, "fp8")


@pytest.mark.parametrize("marker", [(2, torch.float8_e4m3fn), (0, torch.float8_e5m2)])
@pytest.mark.parametrize("extra", ["scale_input", "input_scale", None])
def test_comfyui_per_tensor(tmp_path: Path, extra: str | None, marker: tuple[int, torch.dtype]) -> None:
    source = tensors_of("transformer", seed=13)
    stored = quantize_state_dict(source, Recipe("transformer", "fp8", per_tensor=True))
    stored["scaled_fp8"] = torch.zeros(marker[0]).to(marker[1])
    if extra:
        stored[f"blocks.1.ffn.0.{extra}"] = torch.tensor(0.3)
    stored = {f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}
    path = tmp_path / "comfy.safetensors"
    save_file(stored, path)
    checkpoint = open_checkpoint(path, "transformer")
    bare = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in stored.items()}
    check_exact(checkpoint, bare, "fp8")
    check_close(checkpoint, source, "fp8")
    assert checkpoint.sizes()["num_layers"] == 3


@pytest.mark.parametrize("layout", ["pickle", "single"])
@pytest.mark.parametrize("scale", SCALE_DTYPES)
@pytest.mark.parametrize("form", EIGHT_BITS)
def test_text_encoder_layouts(tmp_path: Path, form: Any, scale: str, layout: Any) -> None:
    source = tensors_of("text_encoder", seed=14)
    path = tmp_path / ("t5.pth" if layout == "pickle" else "t5.safetensors")
    write_layout(path, source, Recipe("text_encoder", form, SCALE_DTYPES[scale]), layout)
    checkpoint = open_checkpoint(path, "text_encoder")
    stored = torch.load(path, weights_only=True) if layout == "pickle" else load_file(path)
    assert len(checkpoint.quantized_linears()) == 7 * 2
    check_exact(checkpoint, stored, form)
    check_close(checkpoint, source, form)


@pytest.mark.parametrize("kind", ["text_encoder", "vae"])
@pytest.mark.parametrize("layout", ["pickle", "single"])
def test_unquantized_parts(tmp_path: Path, kind: Kind, layout: Any) -> None:
    source = tensors_of(kind, seed=15)
    path = tmp_path / ("x.pth" if layout == "pickle" else "x.safetensors")
    write_layout(path, source, Recipe(kind, "fp32", other_dtype=torch.float32), layout)
    checkpoint = open_checkpoint(path, kind)
    assert checkpoint.tensors.keys() == source.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in source.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("form", ["bf16", "fp8", "int8"])
def test_prefixes_and_other_publishers_names(tmp_path: Path, prefix: str, foreign: bool, form: Any) -> None:
    source = quantize_state_dict(tensors_of("transformer", seed=16), Recipe("transformer", form))
    names = from_canonical("transformer", source) if foreign else {name: name for name in source}
    save_file({prefix + names[name]: tensor for name, tensor in source.items()}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors", "transformer")
    assert checkpoint.tensors.keys() == source.keys()
    assert checkpoint.quantization == form
    for name, tensor in source.items():
        assert torch.equal(checkpoint.read(name).float(), tensor.float()), name


@pytest.mark.parametrize("kind", ["text_encoder", "vae"])
def test_other_publishers_parts(tmp_path: Path, kind: Kind) -> None:
    source = tensors_of(kind, seed=17)
    names = from_canonical(kind, source)
    assert not set(names.values()) & set(source)
    save_file({names[name]: tensor for name, tensor in source.items()}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors", kind)
    assert checkpoint.tensors.keys() == source.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in source.items())


@pytest.mark.parametrize("shape", ["[out]", "[1]", "[]"])
def test_scale_shapes(tmp_path: Path, shape: str) -> None:
    stored = quantize_state_dict(tensors_of("transformer", seed=18), Recipe("transformer", "int8"))
    name = "blocks.2.ffn.0.weight_scale"
    rows = stored[name].shape[0]
    stored[name] = {"[out]": stored[name].reshape(-1), "[1]": torch.rand(1), "[]": torch.rand(())}[shape]
    save_file(stored, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors", "transformer")
    assert checkpoint.shape(name) == (rows, 1) and checkpoint.tensors[name].shape == stored[name].shape
    assert torch.equal(checkpoint.read(name), stored[name].reshape(-1, 1).expand(rows, 1))


def save_shards(directory: Path, tensors: dict[str, Tensor], count: int, index: bool = True) -> None:
    """A diffusers-style set of shards."""
    stem = "diffusion_pytorch_model"
    files = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    place = {name: files[number % count] for number, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if place[name] == file}, directory / file)
    if index:
        (directory / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": place})
        )


@pytest.mark.parametrize("index", [True, False])
def test_sharded_set(tmp_path: Path, index: bool) -> None:
    source = tensors_of("transformer", seed=19, dtype=torch.bfloat16)
    save_shards(tmp_path, source, 3, index)
    checkpoint = open_checkpoint(tmp_path, "transformer")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in source.items())
    assert len(checkpoint.files) == 3
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"00002-of-00003\.safetensors is missing"):
        open_checkpoint(tmp_path, "transformer")


def test_the_index_decides_between_shards(tmp_path: Path) -> None:
    source = tensors_of("transformer", seed=20, dtype=torch.bfloat16)
    save_shards(tmp_path, source, 2)
    name = next(iter(source))
    stray = tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors"
    save_file({**load_file(stray), name: source[name] + 1}, stray)
    assert torch.equal(open_checkpoint(tmp_path, "transformer").read(name), source[name])
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=rf"tensor {name} is both in .*00001-of.* and in .*00002-of"):
        open_checkpoint(tmp_path, "transformer")


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    source = tensors_of("transformer", seed=21, dtype=torch.bfloat16)
    save_shards(tmp_path, source, 2)
    first = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    name = next(iter(source))
    save_file({n: t for n, t in load_file(first).items() if n != name}, first)
    with pytest.raises(WeightsError, match=rf"00001-of-00002\.safetensors lacks tensor {name}"):
        open_checkpoint(tmp_path, "transformer")


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("gone", ["block_1.safetensors", "non_block.safetensors"])
def test_a_missing_block_file_is_named(tmp_path: Path, gone: str, index: bool) -> None:
    files = write_layout(tmp_path, tensors_of("transformer", 22), Recipe("transformer", "fp8"), "blocks")
    (tmp_path / gone).unlink()
    if not index:
        files[-1].unlink()
    with pytest.raises(WeightsError, match=rf"{gone} is missing"):
        open_checkpoint(tmp_path, "transformer")


def test_a_missing_last_block_contradicts_the_config(tmp_path: Path) -> None:
    files = write_layout(tmp_path, tensors_of("transformer", 22), Recipe("transformer", "fp8"), "blocks")
    write_config(tmp_path, open_checkpoint(tmp_path, "transformer").sizes())
    files[-1].unlink()
    (tmp_path / "block_2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"config\.json says num_layers 3, the tensors 2"):
        open_checkpoint(tmp_path, "transformer").sizes()


@pytest.mark.parametrize("second", ["single", "blocks"])
def test_two_alternatives_in_a_directory(tmp_path: Path, second: Any) -> None:
    source = tensors_of("transformer", seed=23)
    write_layout(tmp_path / "model_bf16.safetensors", source, Recipe("transformer", "bf16"), "single")
    target = tmp_path / "model_fp8.safetensors" if second == "single" else tmp_path
    write_layout(target, source, Recipe("transformer", "fp8"), second)
    with pytest.raises(WeightsError, match="more than once") as caught:
        open_checkpoint(tmp_path, "transformer")
    assert "model_bf16.safetensors" in str(caught.value)
    assert ("model_fp8.safetensors" if second == "single" else "block_*.safetensors") in str(caught.value)
    assert open_checkpoint(tmp_path / "model_bf16.safetensors", "transformer").quantization == "bf16"


def test_a_directory_with_all_parts(tmp_path: Path) -> None:
    """The published one: block files with their index, T5 and VAE pickles, the transformer's config."""
    for kind in ("transformer", "text_encoder", "vae"):
        source = tensors_of(kind, seed=24)
        target = tmp_path if kind == "transformer" else tmp_path / FILES[kind]
        form = "fp32" if kind == "vae" else "fp8"
        layout = "blocks" if kind == "transformer" else "pickle"
        write_layout(target, source, Recipe(kind, form), layout)  # type: ignore[arg-type]
    write_config(tmp_path, {"dim": 128, "ffn_dim": 160, "num_layers": 3, "text_len": 8, "eps": 1e-6})
    sizes = {"dim": 128, "ffn_dim": 160, "num_layers": 3, "num_heads": 1, "in_dim": 16, "out_dim": 16}
    sizes |= {"text_dim": 48, "freq_dim": 32, "text_len": 8, "eps": 1e-6}
    assert open_checkpoint(tmp_path, "transformer").sizes() == sizes
    sizes = {"vocab_size": 40, "dim": 32, "dim_attn": 48, "dim_ffn": 64, "num_heads": 3}
    sizes |= {"num_layers": 2, "num_buckets": 32}
    assert open_checkpoint(tmp_path, "text_encoder").sizes() == sizes
    assert open_checkpoint(tmp_path, "vae").sizes() == {"base_dim": 8, "z_dim": 16}


def test_plain_files_are_merged(tmp_path: Path) -> None:
    """The converter's parts of 100 tensors have no numbers that tell how many there are."""
    source = tensors_of("transformer", seed=25, dtype=torch.bfloat16)
    names = list(source)
    for part in range(3):
        save_file({name: source[name] for name in names[part::3]}, tmp_path / f"x_part{part + 1}.safetensors")
    save_file(tensors_of("vae", seed=25), tmp_path / "vae.safetensors")  # of another family: not merged
    assert open_checkpoint(tmp_path, "transformer").tensors.keys() == source.keys()
    assert open_checkpoint(tmp_path, "vae").files == (tmp_path / "vae.safetensors",)


def test_find_component(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    source = tensors_of("transformer", seed=26)
    write_layout(weights / "distill_fp8", source, Recipe("transformer", "fp8"), "blocks")
    for name in ("distill_fp8/t5-fp8.pth", "vae.pth", "distill_fp8/config.json"):
        (weights / name).write_bytes(b"x")
    (weights / "distill_int8").mkdir()
    (weights / "distill_int8" / "t5-int8.pth").write_bytes(b"x")
    assert find_component(weights, ("distill_fp8",), (".",)) == weights / "distill_fp8"
    assert find_component(weights, ("distill_fp8",), ("t5-int8.pth", "t5-fp8.pth")).name == "t5-fp8.pth"
    assert find_component(weights, ("distill_fp8",), ("vae.pth",)) == weights / "vae.pth"
    with pytest.raises(WeightsError) as caught:
        find_component(weights, ("distill_int8",), ("model.safetensors", "."))
    for said in (str(weights / "distill_int8"), f"{weights}.", "model.safetensors", "block files"):
        assert said in str(caught.value)
