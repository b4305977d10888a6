"""Strict loading: all tensors, no other, right shapes and dtypes, nothing left on meta."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.checkpoint import Checkpoint, load_weights, open_checkpoint
from runtime.checkpoint.convert import Recipe, quantize_state_dict, write_layout
from runtime.checkpoint.files import read_header, read_pieces
from runtime.checkpoint.names import Kind
from runtime.errors import WeightsError
from runtime.linear import Fp8Linear, Int8Linear, swap_linears
from tests.unit.checkpoint_fixtures import on_meta, tensors_of

CLASSES = {"fp8": Fp8Linear, "int8": Int8Linear}


def opened(tmp_path: Path, kind: Kind, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path / "model.safetensors", kind)


def loaded(checkpoint: Checkpoint, dtype: torch.dtype, **options: Any) -> nn.Module:
    model = on_meta(checkpoint.kind)
    swap_linears(model, checkpoint.quantized_linears())
    load_weights(model, checkpoint, dtype=dtype, device="cpu", **options)
    return model


@pytest.mark.parametrize("kind", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floating_weights(tmp_path: Path, kind: Kind, dtype: torch.dtype) -> None:
    source = tensors_of(kind, seed=41)
    model = loaded(opened(tmp_path, kind, source), dtype)
    state = model.state_dict()
    assert state.keys() == source.keys()
    assert all(torch.equal(state[name], tensor.to(dtype)) for name, tensor in source.items())
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("kind", ["transformer", "text_encoder"])
def test_quantized_weights(tmp_path: Path, kind: Kind, form: Any) -> None:
    recipe = Recipe(kind, form, scale_dtype=torch.bfloat16, other_dtype=torch.float32)
    source = quantize_state_dict(tensors_of(kind, seed=42), recipe)
    seen: list[int] = []
    checkpoint = opened(tmp_path, kind, source)
    model = loaded(checkpoint, torch.bfloat16, fp32_parameters=("norm", "modulation"), on_bytes=seen.append)
    assert sum(seen) == checkpoint.nbytes and len(seen) == len(source)
    swapped = {name for name, module in model.named_modules() if isinstance(module, CLASSES[form])}
    assert swapped == set(checkpoint.quantized_linears()) and len(swapped) == (
        30 if kind == "transformer" else 14
    )
    for name, tensor in model.state_dict().items():
        module = name.rpartition(".")[0]
        if name.endswith(".weight") and module in swapped:
            expected = source[name].dtype
        elif name.endswith(".weight_scale") or module in swapped:  # scales, and biases of quantized linears
            expected = torch.float32
        else:
            expected = torch.float32 if "norm" in name or "modulation" in name else torch.bfloat16
        assert tensor.dtype == expected, name
        assert torch.equal(tensor.float(), source[name].float().to(expected).float()), name


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8"])
def test_a_loaded_transformer_denoises_like_its_source(tmp_path: Path, form: Any) -> None:
    """From the block layout through the swap to a velocity near that of the fp32 weights."""
    source = tensors_of("transformer", seed=43)
    write_layout(tmp_path, source, Recipe("transformer", form, other_dtype=torch.float32), "blocks")
    model = loaded(open_checkpoint(tmp_path, "transformer"), torch.float32)
    twin = on_meta("transformer").to_empty(device="cpu")
    twin.load_state_dict(source)
    generator = torch.Generator().manual_seed(44)
    inputs = (
        torch.randn(1, 16, 2, 4, 6, generator=generator),
        torch.tensor([625.0]),
        torch.randn(1, 8, 48, generator=generator),
    )
    with torch.inference_mode():
        given, expected = model(*inputs), twin(*inputs)
    error = float((given - expected).norm() / expected.norm())
    print(f"{form}: relative RMS difference of the velocity {error:.2e}")
    assert 0 < error < {"bf16": 0.01, "fp8": 0.06, "int8": 0.03}[form]


def test_all_faults_are_one_message(tmp_path: Path) -> None:
    source = tensors_of("transformer", seed=45)
    for n in range(3):
        del source[f"blocks.{n}.self_attn.q.bias"], source[f"blocks.{n}.ffn.0.bias"]
    source["blocks.0.extra.weight"] = torch.randn(3)
    source["blocks.1.norm3.bias"] = torch.randn(64)
    checkpoint = opened(tmp_path, "transformer", source)
    with pytest.raises(WeightsError) as caught:
        loaded(checkpoint, torch.float32)
    for said in (
        "model.safetensors does not fit the model",
        "6 missing (blocks.0.ffn.0.bias, blocks.0.self_attn.q.bias",
        "and 1 more)",
        "1 unknown (blocks.0.extra.weight in model.safetensors)",
        "1 misshapen (blocks.1.norm3.bias is (64,) in model.safetensors, expected (128,))",
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen"])
@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_each_fault_names_its_tensor(tmp_path: Path, fault: str, form: Any) -> None:
    source = quantize_state_dict(tensors_of("transformer", seed=46), Recipe("transformer", form))
    name = "blocks.2.cross_attn.norm_k.bias" if fault == "unknown" else "blocks.2.cross_attn.k.bias"
    if fault == "missing":
        del source[name]
    else:
        source[name] = torch.randn(129)
    checkpoint = opened(tmp_path, "transformer", source)
    with pytest.raises(WeightsError, match=rf"1 {fault} \({name}"):
        loaded(checkpoint, torch.bfloat16)


def test_quantized_weights_without_the_swap(tmp_path: Path) -> None:
    source = quantize_state_dict(tensors_of("transformer", seed=47), Recipe("transformer", "int8"))
    checkpoint = opened(tmp_path, "transformer", source)
    with pytest.raises(
        WeightsError, match=r"of another format .*is int8 .*the model's layer is floating point"
    ):
        load_weights(on_meta("transformer"), checkpoint, dtype=torch.float32, device="cpu")
    model = on_meta("transformer")
    swap_linears(model, dict.fromkeys(checkpoint.quantized_linears(), "fp8"))
    with pytest.raises(WeightsError, match=r"is int8 .*the model's layer is fp8"):
        load_weights(model, checkpoint, dtype=torch.float32, device="cpu")


def test_a_buffer_left_on_meta_is_a_bug_that_is_told(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "vae", tensors_of("vae", seed=48))
    model = on_meta("vae")
    model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="table is still on the meta device"):
        load_weights(model, checkpoint, dtype=torch.float32, device="cpu")


def test_a_transposed_pickle_loads(tmp_path: Path) -> None:
    source = tensors_of("text_encoder", seed=49)
    name = "blocks.0.attn.q.weight"
    torch.save({"state_dict": {**source, name: source[name].t().contiguous().t()}}, tmp_path / "t5.pth")
    checkpoint = open_checkpoint(tmp_path / "t5.pth", "text_encoder")
    assert checkpoint.tensors[name].offset is None
    assert torch.equal(loaded(checkpoint, torch.float32).state_dict()[name], source[name])


@pytest.mark.parametrize("most", [1, 4, 24, 1000])
def test_a_tensor_in_pieces_is_the_tensor(tmp_path: Path, most: int) -> None:
    table = torch.randn(7, 5).bfloat16()
    save_file({"x": table}, tmp_path / "a.safetensors")
    info = read_header(tmp_path / "a.safetensors")["x"]
    joined = torch.zeros(35, dtype=torch.bfloat16)
    for first, piece in read_pieces(info, most):
        assert piece.nbytes <= max(most, 2)
        joined[first : first + len(piece)] = piece
    assert torch.equal(joined.view(7, 5), table)
