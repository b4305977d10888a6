"""From a directory to models: what a variant holds, what a wrong manifest says, where the parts rest."""

from pathlib import Path

import pytest
import torch

from runtime import loading
from runtime.errors import WeightsError
from runtime.linear import QuantizedLinear
from runtime.profiles import find_model, load_manifest, load_profile
from runtime.schema import ModelManifest
from runtime.transformer import Transformer
from tests import loaded, tiny

ENTRY = Transformer.ENTRY


def manifest_of(directory: Path, **changes: object) -> tuple[ModelManifest, Path]:
    manifest, where = find_model(directory, load_profile("cpu"))
    return manifest.model_copy(update=changes), where


@pytest.mark.parametrize("variant", ["bf16", "fp8", "int8"])
def test_each_variant_loads_in_its_own_format(tiny_checkpoint: Path, variant: str) -> None:
    directory = tiny_checkpoint / ("distill_models" if variant == "bf16" else f"distill_{variant}")
    manifest, where = manifest_of(directory)
    files = loading.open_files(manifest, where)
    read: list[int] = []
    encoder = loading.load_text_encoder(files.text_encoder, manifest, "cpu", torch.float32)
    assert any(isinstance(m, QuantizedLinear) for m in encoder.modules()) == (variant != "bf16")
    with loaded.transformer(files, manifest, read.append) as model:
        eight_bit = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        assert len(eight_bit) == (0 if variant == "bf16" else 10 * tiny.TRANSFORMER.num_layers)
        assert {m.form.name for m in eight_bit} <= {variant}
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
    entry = sum(info.nbytes for name, info in files.transformer.tensors.items() if name.startswith(ENTRY))
    assert sum(read) == files.transformer.nbytes - entry


def test_sizes_come_from_the_tensors(tiny_checkpoint: Path) -> None:
    manifest, where = manifest_of(tiny_checkpoint)
    files = loading.open_files(manifest, where)
    with loaded.transformer(files, manifest) as model:
        assert model.config == tiny.TRANSFORMER
    vae = loading.load_vae(files.vae, manifest, "cpu", torch.float32)
    assert vae.config == tiny.VAE_SIZES


def test_a_manifest_of_other_sizes_names_both(tiny_checkpoint: Path) -> None:
    pinned = load_manifest("wan2.1-t2v-14b-4step-bf16")
    manifest, where = manifest_of(tiny_checkpoint, transformer=pinned.transformer)
    files = loading.open_files(manifest, where)
    refused = pytest.raises(WeightsError, match=r"128.*5120|5120.*128")
    with refused, loaded.transformer(files, manifest):
        pass


def test_an_fp8_file_in_a_bf16_place_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "weights"
    swapped.mkdir()
    (swapped / "google").symlink_to(tiny_checkpoint / "google")
    (swapped / "distill_models").symlink_to(tiny_checkpoint / "distill_fp8")
    manifest = load_manifest("wan2.1-t2v-14b-4step-bf16")
    with pytest.raises(WeightsError, match=r"fp8.*bf16"):
        loading.open_files(manifest, swapped)


def test_a_missing_part_names_the_places(tiny_checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / "weights"
    partial.mkdir()
    (partial / "distill_fp8").mkdir()
    for file in (tiny_checkpoint / "distill_fp8").iterdir():
        if file.name != "Wan2.1_VAE.pth":
            (partial / "distill_fp8" / file.name).symlink_to(file)
    (partial / "google").symlink_to(tiny_checkpoint / "google")
    manifest, where = manifest_of(partial)
    with pytest.raises(WeightsError, match=r"Wan2\.1_VAE"):
        loading.open_files(manifest, where)
    # the spec's second place: the directory above the variant
    (partial / "Wan2.1_VAE.pth").symlink_to(tiny_checkpoint / "distill_fp8" / "Wan2.1_VAE.pth")
    assert loading.open_files(manifest, where).vae.path == partial / "Wan2.1_VAE.pth"


def test_a_variant_directory_alone_finds_what_lies_beside_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    variant = tmp_path / "weights" / "distill_int8"
    variant.mkdir(parents=True)
    shared = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-int8.pth")
    for file in (tiny_checkpoint / "distill_int8").iterdir():
        (variant.parent if file.name in shared else variant).joinpath(file.name).symlink_to(file)
    (variant.parent / "google").symlink_to(tiny_checkpoint / "google")
    manifest, where = manifest_of(variant)
    files = loading.open_files(manifest, where)
    assert where == variant and files.transformer.quantization == "int8"
    assert [part.path.resolve().name for part in (files.vae, files.text_encoder)] == list(shared)
