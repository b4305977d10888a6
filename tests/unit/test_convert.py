"""Files in the published layouts: the published formulas, one file or many, tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoint import open_checkpoint
from runtime.checkpoint.convert import (
    INDEX_FILE,
    Recipe,
    quantize_state_dict,
    write_config,
    write_layout,
)
from runtime.checkpoint.names import Kind
from runtime.errors import OutputError
from tests.unit.checkpoint_fixtures import EIGHT_BITS, raw, tensors_of


@pytest.mark.parametrize("form", EIGHT_BITS)
@pytest.mark.parametrize("kind", ["transformer", "text_encoder"])
def test_what_is_quantized(kind: Kind, form: Any) -> None:
    source = tensors_of(kind, seed=51)
    stored = quantize_state_dict(source, Recipe(kind, form))
    matrices = {
        name
        for name, tensor in source.items()
        if name.startswith("blocks.") and tensor.ndim == 2 and "pos_embedding" not in name
    }
    assert {name for name, t in stored.items() if t.dtype == EIGHT_BITS[form]} == matrices
    assert stored.keys() - source.keys() == {f"{name}_scale" for name in matrices}
    assert {t.dtype for name, t in stored.items() if name not in matrices and "_scale" not in name} == {
        torch.bfloat16
    }
    for name in matrices:
        absmax = source[name].abs().max(dim=1, keepdim=True).values
        assert torch.equal(stored[f"{name}_scale"], absmax / {"fp8": 448, "int8": 127}[form])
        top = stored[name].float().abs().max(dim=1).values
        assert torch.equal(top, torch.full_like(top, {"fp8": 448, "int8": 127}[form]))


def test_comfyui_scale_is_one_number() -> None:
    source = tensors_of("transformer", seed=52)
    stored = quantize_state_dict(source, Recipe("transformer", "fp8", per_tensor=True))
    name = "blocks.0.ffn.2"
    assert stored[f"{name}.scale_weight"].shape == ()
    assert torch.equal(stored[f"{name}.scale_weight"], source[f"{name}.weight"].abs().max() / 448)
    assert stored["scaled_fp8"].dtype == torch.float8_e4m3fn and stored["scaled_fp8"].shape == (2,)
    assert not any(name.endswith("weight_scale") for name in stored)
    with pytest.raises(ValueError, match="per_tensor is ComfyUI's fp8"):
        Recipe("transformer", "int8", per_tensor=True)


def test_block_layout_and_its_index(tmp_path: Path) -> None:
    files = write_layout(tmp_path, tensors_of("transformer", seed=53), Recipe("transformer", "fp8"), "blocks")
    names = [file.name for file in files]
    assert names == [f"block_{n}.safetensors" for n in range(3)] + ["non_block.safetensors", INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(file.stat().st_size for file in files[:-1])
    assert {name: files[0].parent / file for name, file in index["weight_map"].items()} == {
        name: file for file in files[:-1] for name in raw([file])
    }
    assert set(raw([files[1]])) == {name for name in index["weight_map"] if name.startswith("blocks.1.")}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8"])
def test_text_encoder_pickle(tmp_path: Path, form: Any) -> None:
    source = tensors_of("text_encoder", seed=55)
    write_layout(tmp_path / "t5.pth", source, Recipe("text_encoder", form), "pickle")
    stored = torch.load(tmp_path / "t5.pth", weights_only=True)
    quantized = 0 if form == "bf16" else 14
    assert sum(name.endswith(".weight_scale") for name in stored) == quantized
    assert open_checkpoint(tmp_path / "t5.pth", "text_encoder").quantization == form


def test_config_agrees_with_what_was_written(tmp_path: Path) -> None:
    write_layout(tmp_path, tensors_of("transformer", 56), Recipe("transformer", "int8"), "blocks")
    sizes = open_checkpoint(tmp_path, "transformer").sizes()
    path = write_config(tmp_path, sizes | {"text_len": 8, "eps": 1e-6})
    assert json.loads(path.read_text())["_class_name"] == "WanModel"
    assert open_checkpoint(tmp_path, "transformer").sizes() == sizes | {"text_len": 8, "eps": 1e-6}


def test_an_unwritable_target_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"block_0\.safetensors cannot be written"):
        write_layout(tmp_path / "file", tensors_of("transformer", 57), Recipe("transformer", "fp8"), "blocks")
