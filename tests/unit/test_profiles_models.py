"""Manifests: every shipped file is valid and right, and a model is found by name, family or directory."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import profiles
from runtime.errors import RequestError, WeightsError
from runtime.profiles import (
    find_model,
    list_manifests,
    load_manifest,
    load_profile,
    model_from_directory,
    parse,
    resolve_model,
)
from runtime.schema import ModelManifest, project_root

FAMILY = "wan2.1-t2v-14b-4step"
ADA, AMPERE, CPU = (load_profile(name) for name in ("rtx4090", "rtx3090", "cpu"))


def good() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((project_root() / "profiles/models/demo.yaml").read_text())
    return data


def refusal(data: object) -> str:
    with pytest.raises(RequestError) as caught:
        parse(ModelManifest, yaml.safe_dump(data), "demo.yaml")
    return str(caught.value)


def test_all_ship_and_validate() -> None:
    variants = {f"{FAMILY}-{q}" for q in ("fp8", "int8", "bf16")} | {"demo", "demo-fp8", "demo-int8"}
    variants |= {f"{FAMILY}-{q}-single" for q in ("fp8", "int8", "bf16")} | {f"{FAMILY}-fp8-comfyui"}
    assert variants | {"wan2.1-t2v-1.3b"} == set(list_manifests())
    for name in list_manifests():
        manifest = load_manifest(name)
        assert manifest.name == name
        assert (manifest.embedded is not None) == (manifest.family == "demo")
        assert (manifest.source is not None) == (manifest.family != "demo")
        assert manifest.sampling.distilled == (name in variants)
        assert (manifest.sampling.steps, manifest.sampling.guidance) == (
            (4, 1) if name in variants else (50, 5)
        )


def test_fourteen_billion_parameters() -> None:
    """The pinned sizes give the published parameter totals of transformer and text encoder."""
    for name in (f"{FAMILY}-{q}" for q in ("fp8", "int8", "bf16")):
        manifest = load_manifest(name)
        t, e = manifest.transformer, manifest.text_encoder
        assert t is not None
        assert e is not None
        d = t.dim
        block = 8 * (d * d + d) + 2 * d * t.ffn_dim + t.ffn_dim + d + 4 * d + 2 * d + 6 * d
        outside = (64 * d + d) + (t.text_dim * d + d) + (d * d + d) + (t.freq_dim * d + d) + (d * d + d)
        outside += (6 * d * d + 6 * d) + 2 * d + (64 * d + 64)
        assert t.num_layers * block + outside == 14_288_491_584
        layer = 4 * e.dim * e.dim_attn + 3 * e.dim * e.dim_ffn + 2 * e.dim + e.num_buckets * e.num_heads
        assert e.vocab_size * e.dim + e.num_layers * layer + e.dim == 5_680_910_336


def test_what_is_downloaded_is_what_is_looked_for() -> None:
    """The files of each manifest serve its candidates, in a directory that holds nothing else."""
    for name in list_manifests():
        manifest = load_manifest(name)
        targets = {file.target for source in manifest.sources() for file in source.files}
        places = ["", *(f"{place}/" for place in manifest.subdirectories)]
        for part, candidates in manifest.files.model_dump().items():
            if not targets:
                continue
            named = [place + candidate for place in places for candidate in candidates if candidate != "."]
            blocks = [target for target in targets if target.endswith("/block_0.safetensors")]
            assert targets & set(named) or (part == "transformer" and blocks), f"{name} has no {part}"


def test_published_sizes() -> None:
    """Totals as the recipes tell them; only the 1.3B model's digests have been seen."""
    totals = {"fp8": 22.3, "int8": 22.3, "bf16": 40.5}
    for name in list_manifests():
        manifest = load_manifest(name)
        files = [file for source in manifest.sources() for file in source.files]
        total = sum(file.about_bytes for file in files) / 1e9
        if manifest.family.startswith(FAMILY):
            assert total == pytest.approx(totals[str(manifest.quantization)], abs=0.06), name
        stated = {file.known for file in files if not file.optional}
        assert stated == ({"published"} if "1.3b" in name else {"unknown"} if files else set())
    blocks = [
        file.path for file in load_manifest(f"{FAMILY}-int8").sources()[0].files if "block_" in file.path
    ]
    assert len(blocks) == 40


def test_one_billion_parameters() -> None:
    manifest = load_manifest("wan2.1-t2v-1.3b")
    t = manifest.transformer
    assert t is not None
    d = t.dim
    block = 8 * (d * d + d) + 2 * d * t.ffn_dim + t.ffn_dim + d + 4 * d + 2 * d + 6 * d
    outside = (64 * d + d) + (t.text_dim * d + d) + (d * d + d) + (t.freq_dim * d + d) + (d * d + d)
    outside += (6 * d * d + 6 * d) + 2 * d + (64 * d + 64)
    parameters = t.num_layers * block + outside
    assert parameters == 1_418_996_800
    (size,) = (f.bytes for s in manifest.sources() for f in s.files if "diffusion" in f.path)
    assert size is not None
    assert 0 < size - 4 * parameters < 200_000  # fp32, and a header


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ({"path": "a", "bytes": 5}, "known"),
        ({"path": "a", "known": "published", "bytes": 5}, "both bytes and sha256"),
        ({"path": "a", "known": "recorded", "bytes": 5, "sha256": "xyz"}, "sha256"),
        ({"path": "a", "known": "guessed"}, "known"),
        ({"path": "../a"}, "files.0.path"),
        ({"path": "a", "to": ".t2v/x"}, "files.0.to"),
        ({"path": "a", "size": 5}, "size"),
    ],
)
def test_published_files_refused(file: dict[str, Any], told: str) -> None:
    source = {"repository": "a/b", "revision": None, "files": [file]}
    assert told in refusal(good() | {"source": source})
    twice = source | {"files": [{"path": "a"}, {"path": "b", "to": "a"}]}
    assert "two published files go to a" in refusal(good() | {"source": twice})
    assert "companions" in refusal(good() | {"companions": [source | {"files": []}]})


def test_published_names_are_candidates() -> None:
    fp8, int8, bf16 = (load_manifest(f"{FAMILY}-{q}") for q in ("fp8", "int8", "bf16"))
    assert fp8.subdirectories[0] == "distill_fp8"
    assert int8.subdirectories[0] == "distill_int8"
    assert bf16.subdirectories[0] == "distill_models"
    assert "wan2.1_t2v_14b_scaled_fp8_e4m3_lightx2v_4step.safetensors" in fp8.files.transformer
    assert "wan2.1_t2v_14b_int8_lightx2v_4step.safetensors" in int8.files.transformer
    assert {"wan2.1_t2v_14b_lightx2v_4step.safetensors", "distill_model.safetensors"} <= set(
        bf16.files.transformer
    )
    for manifest in (fp8, int8, bf16):
        assert manifest.files.transformer[-1] == "."
        assert f"models_t5_umt5-xxl-enc-{manifest.quantization}.pth" in manifest.files.text_encoder
        assert "Wan2.1_VAE.pth" in manifest.files.vae
        assert manifest.files.tokenizer[0] == "google/umt5-xxl/tokenizer.json"
        assert manifest.directories(Path("/w"))[0] == Path("/w") / manifest.subdirectories[0]
        assert manifest.directories(Path("/w"))[-1] == Path("/w")


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("defaults.frames", 18, ["defaults", "18", "4n+1"]),
        ("defaults.height", 100, ["defaults.height", "100", "multiple of 16"]),
        ("sampling.guidance", 6.0, ["sampling", "6", "distilled"]),
        ("sampling.steps", 0, ["sampling.steps", "0"]),
        ("sampling.sampler", "ddim", ["sampling.sampler", "'ddim'", "'lcm' or 'euler'"]),
        ("sampling.text_len", 77, ["77", "transformer.text_len"]),
        ("transformer.eps", "1e-6", ["transformer.eps", "1.0e-6"]),
        ("transformer.dim", 250, ["transformer", "250"]),
        ("transformer.dim", -256, ["transformer.dim", "-256"]),
        ("transformer.heads", 2, ["'transformer.heads'", "num_heads"]),
        ("text_encoder.dim", 64, ["text_encoder.dim", "64", "128"]),
        ("vae.z_dim", 8, ["vae.z_dim", "8", "16"]),
        ("files.transformer", [], ["files.transformer"]),
        ("files.transformer", "x", ["files.transformer", "'x'"]),
        ("files.vae", ["../../etc/passwd"], ["files.vae.0", "relative"]),
        ("files.vae", ["/etc/passwd"], ["files.vae.0", "relative"]),
        ("subdirectories", [".."], ["subdirectories.0", "relative"]),
        ("embedded", "../demo", ["embedded", "relative"]),
        ("source", {"repository": "https://example.org/a/b"}, ["source.repository"]),
        ("quantization", "int4", ["quantization", "'int4'"]),
    ],
)
def test_refused(path: str, value: object, told: list[str]) -> None:
    data = good()
    *parents, last = path.split(".")
    owner = data
    for parent in parents:
        owner = owner[parent]
    owner[last] = value
    message = refusal(data)
    for words in ["demo.yaml", *told]:
        assert words in message, message


def test_sizes_may_be_left_to_the_tensors() -> None:
    data = good() | {"transformer": None, "text_encoder": None, "vae": None}
    assert parse(ModelManifest, yaml.safe_dump(data), "demo.yaml").transformer is None


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)


@settings(max_examples=60, deadline=None)
@given(
    part=st.sampled_from([*good()]),
    value=leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=8), leaves, max_size=3),
)
def test_one_random_part(part: str, value: object) -> None:
    try:
        parse(ModelManifest, yaml.safe_dump(good() | {part: value}), "demo.yaml")
    except RequestError as error:
        assert str(error).startswith("demo.yaml")
        assert "\n" not in str(error)


def test_resolve_by_name_and_family() -> None:
    assert resolve_model(f"{FAMILY}-int8", ADA).quantization == "int8"
    assert resolve_model(FAMILY, ADA).name == f"{FAMILY}-fp8"
    assert resolve_model(FAMILY, AMPERE).name == f"{FAMILY}-int8"
    assert resolve_model(FAMILY, CPU).name == f"{FAMILY}-bf16"
    assert resolve_model("demo", ADA).name == "demo"  # a manifest before a family


def test_family_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    left = ["demo", f"{FAMILY}-bf16", f"{FAMILY}-int8"]
    monkeypatch.setattr(profiles, "list_manifests", lambda: left)
    assert resolve_model(FAMILY, ADA).quantization == "int8"
    left.pop()
    assert resolve_model(FAMILY, ADA).quantization == "bf16"


def test_unknown_model() -> None:
    with pytest.raises(RequestError, match=r"did you mean .*wan2\.1-t2v-14b-4step.*`t2v models`"):
        resolve_model("wan2.1-t2v-14b", ADA)
    with pytest.raises(RequestError, match=r"No model is called 'demo-fp9'; did you mean demo"):
        load_manifest("demo-fp9")


def test_find_model_embedded(tmp_path: Path) -> None:
    manifest, directory = find_model("demo-int8", ADA, tmp_path)
    assert manifest.name == "demo-int8"
    assert directory == manifest.embedded_directory() == project_root() / "demo" / "weights"


def test_find_model_prefers_what_is_there(tmp_path: Path) -> None:
    assert find_model(FAMILY, ADA, tmp_path)[0].quantization == "fp8"  # nothing there: what to get
    (tmp_path / "distill_int8").mkdir()
    assert find_model(FAMILY, ADA, tmp_path) == (load_manifest(f"{FAMILY}-int8"), tmp_path)
    (tmp_path / "wan2.1_t2v_14b_scaled_fp8_e4m3_lightx2v_4step.safetensors").touch()
    assert find_model(FAMILY, ADA, tmp_path)[0].quantization == "fp8"
    assert find_model(f"{FAMILY}-bf16", ADA, tmp_path)[0].quantization == "bf16"  # named in full: obeyed


def test_find_model_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent does not exist.*--weights.*--model demo"):
        find_model(FAMILY, ADA, tmp_path / "absent")


def test_directory_with_variants(tmp_path: Path) -> None:
    (tmp_path / "distill_fp8").mkdir()
    (tmp_path / "distill_int8").mkdir()
    manifest, directory = find_model(tmp_path, ADA)
    assert directory == tmp_path
    assert manifest.quantization == "fp8"
    assert manifest.subdirectories[0] == "distill_fp8"
    assert manifest.transformer is manifest.text_encoder is manifest.vae is None
    assert manifest.embedded is None
    assert model_from_directory(tmp_path, AMPERE).quantization == "int8"
    (tmp_path / "distill_fp8").rmdir()
    assert model_from_directory(str(tmp_path), ADA).quantization == "int8"  # the only one there


def test_bare_variant_directory(tmp_path: Path) -> None:
    root = tmp_path / "distill_int8"
    root.mkdir()
    (root / "block_0.safetensors").touch()
    manifest = model_from_directory(root, ADA)
    assert manifest.subdirectories == ()
    assert manifest.quantization == "int8"  # from the directory's name
    assert manifest.files.transformer[-1] == "."
    assert "models_t5_umt5-xxl-enc-int8.pth" in manifest.files.text_encoder
    assert "../google/umt5-xxl/tokenizer.json" in manifest.files.tokenizer


def test_directory_that_says_nothing(tmp_path: Path) -> None:
    root = tmp_path / "Mein Modell"
    root.mkdir()
    manifest = model_from_directory(root, ADA)
    assert manifest.quantization is None  # left to the tensors
    assert manifest.name == "mein-modell"
    with pytest.raises(RequestError, match="absent: is not a directory"):
        model_from_directory(tmp_path / "absent", ADA)
