"""Random checkpoints: the published layouts, numbers of the right scale, files that are whole or absent."""

import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entrypoint.synth import shapes_of
from runtime.checkpoint import archive, synth
from runtime.checkpoint.archive import holds, pickled, write_archive
from runtime.checkpoint.files import read_pickle, read_tensor
from runtime.checkpoint.noise import TABLE, Noise
from runtime.checkpoint.published import KINDS, SynthPlan, plan_synth
from runtime.checkpoint.synth import NOTE_FILE, synthesize
from runtime.errors import FourstepError, OutputError, RequestError
from runtime.loading import load_text_encoder, load_vae, open_files
from runtime.profiles import list_manifests, load_manifest
from runtime.schema import ModelManifest, project_root
from tests import loaded, tiny
from tests.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = project_root() / "demo" / "weights" / "google" / "umt5-xxl" / "tokenizer.json"
FORMATS = ("wan2.1-t2v-14b-4step-fp8", "wan2.1-t2v-14b-4step-int8", "wan2.1-t2v-14b-4step-bf16")
LAYOUTS = (*FORMATS, "wan2.1-t2v-14b-4step-fp8-single", "wan2.1-t2v-14b-4step-fp8-comfyui", "wan2.1-t2v-1.3b")


def small(name: str) -> ModelManifest:
    """The manifest `name` with the sizes of the tiny model: its layout in a megabyte."""
    manifest = load_manifest(name)
    sizes: dict[str, Any] = {}
    for part, config in (("transformer", tiny.TRANSFORMER), ("text_encoder", tiny.TEXT_ENCODER)):
        fields = getattr(manifest, part)
        sizes[part] = fields.model_copy(update={k: getattr(config, k) for k in type(fields).model_fields})
    sizes["vae"] = manifest.vae.model_copy(update={"base_dim": 8}) if manifest.vae else None
    assert manifest.source is not None
    # About so many bytes are those of the large model, by which this one's dtypes would be chosen wrongly.
    files = tuple(file.model_copy(update={"about_gb": None}) for file in manifest.source.files)
    sizes["source"] = manifest.source.model_copy(update={"files": files})
    return manifest.model_copy(update=sizes)


def plan_of(manifest: ModelManifest) -> SynthPlan:
    return plan_synth(manifest, shapes_of(manifest, KINDS))


def make(plan: SynthPlan, directory: Path, **options: Any) -> synth.Synthesized:
    return synthesize(plan, directory, tokenizer=TOKENIZER, **options)


@pytest.fixture(autouse=True)
def same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """One Noise for each seed of a test process: its table takes a third of a second."""
    monkeypatch.setattr(synth, "Noise", noise_of)


@cache
def noise_of(seed: int) -> Noise:
    return Noise(seed)


# ---------------------------------------------------------------------------------------------------- archive


def stored() -> dict[str, Tensor]:
    """A few tensors of every kind, among them a number and an empty one."""
    return {
        "a.weight": torch.randn(33, 17),
        "b": torch.randn(5, 7).bfloat16(),
        "c.weight": torch.randn(64, 64).to(torch.float8_e4m3fn),
        "c.weight_scale": torch.rand(64, 1),
        "d": torch.randint(-128, 127, (9, 3), dtype=torch.int8),
        "e": torch.tensor(3.5),
        "f": torch.empty(0, 4),
    }


def written(path: Path, tensors: dict[str, Tensor], length: int = 10) -> int:
    def pieces(name: str, like: Tensor) -> Iterator[Tensor]:
        yield from tensors[name].reshape(-1).split(length) if like.numel() else ()

    return write_archive(path, {name: tensor.to("meta") for name, tensor in tensors.items()}, pieces)


def same(one: Tensor, two: Tensor) -> bool:
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*flat)


@pytest.mark.parametrize("big", [False, True])
def test_an_archive_is_what_torch_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, big: bool) -> None:
    if big:  # every record with the fields of one beyond 4 GiB
        monkeypatch.setattr(archive, "_BIG", 0)
    tensors = stored()
    path = tmp_path / "model.pth"
    assert written(path, tensors) == path.stat().st_size
    for mapped in (True, False):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert list(loaded) == list(tensors)
        assert all(same(loaded[name], tensors[name]) for name in tensors)
    infos, mapped_tensors = read_pickle(path)
    assert all(mapped_tensors[name].data_ptr() % 64 == 0 for name in tensors if tensors[name].numel())
    assert all(same(read_tensor(infos[name]), tensors[name]) for name in tensors if tensors[name].numel())
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
    assert list(tmp_path.iterdir()) == [path]


def test_the_pickle_is_torchs_own_to_the_byte() -> None:
    tensors = stored()
    file = io.BytesIO()
    torch.save(tensors, file)
    with zipfile.ZipFile(file) as saved:
        name = next(name for name in saved.namelist() if name.endswith("/data.pkl"))
        assert pickled({key: tensor.to("meta") for key, tensor in tensors.items()}) == saved.read(name)


def test_pieces_that_do_not_fit_leave_no_file(tmp_path: Path) -> None:
    plan = {"a": torch.empty(8, device="meta")}
    for pieces, message in (([torch.ones(7)], "has 32 bytes"), ([torch.ones(8).half()], "float16")):
        with pytest.raises(ValueError, match=message):
            write_archive(tmp_path / "x.pth", plan, lambda name, like, pieces=pieces: pieces)
    assert not list(tmp_path.iterdir())


def test_what_an_archive_holds(tmp_path: Path) -> None:
    tensors = stored()
    path = tmp_path / "model.pth"
    written(path, tensors)
    plan = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert holds(path, plan)
    assert not holds(path, plan | {"g": torch.empty(1, device="meta")})
    assert not holds(path, plan | {"a.weight": torch.empty(33, 18, device="meta")})
    assert not holds(tmp_path / "absent.pth", plan)
    path.write_bytes(path.read_bytes()[:-300])
    assert not holds(path, plan)


def test_an_archive_needs_the_memory_of_a_piece(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from runtime.checkpoint.archive import write_archive\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "piece, before = torch.randn(1 << 18), peak()\n"
        "plan = {'t': torch.empty(160, 1 << 18, device='meta')}\n"
        "write_archive(Path(sys.argv[1]), plan, lambda name, like: [piece] * 160)\n"
        "print(before, peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "big.pth")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, grown = map(int, done.stdout.split())
    print(f"160 MiB written, {grown} MiB more than the {before} MiB before")
    assert grown < 40


# -------------------------------------------------------------------------------------------------- published


@cache
def shapes_of_sizes(transformer: str, encoder: str, vae: str) -> Any:
    manifest = next(
        load_manifest(name)
        for name in list_manifests()
        if sizes_of(load_manifest(name)) == (transformer, encoder, vae)
    )
    return shapes_of(manifest, KINDS)


def sizes_of(manifest: ModelManifest) -> tuple[str, str, str]:
    return str(manifest.transformer), str(manifest.text_encoder), str(manifest.vae)


@pytest.mark.parametrize("name", list_manifests())
def test_files_are_those_that_are_published_and_as_large(name: str) -> None:
    manifest = load_manifest(name)
    plan = plan_synth(manifest, shapes_of_sizes(*sizes_of(manifest)))
    embedded = manifest.embedded_directory()
    if embedded is None:
        known = {f.target: f.about_bytes for s in manifest.sources() for f in s.files if not f.optional}
        beside = {plan.tokenizer}
        assert set(plan.files) | beside == set(known)
    else:
        known = {path: (embedded / path).stat().st_size for path in plan.files}
    for path in plan.files:
        wrong = abs(plan.size_of(path) - known[path]) / known[path]
        print(f"{path}: {plan.size_of(path) / 1e9:.4f} GB, published {known[path] / 1e9:.4f}")
        assert wrong < 0.006  # sizes of manifests have three digits


def test_an_8_bit_file_has_the_rest_in_fp32_and_its_encoder_in_bf16() -> None:
    manifest = load_manifest(FORMATS[0])
    plan = plan_synth(manifest, shapes_of_sizes(*sizes_of(manifest)))
    block = plan.files["distill_fp8/block_7.safetensors"].holds
    assert block["blocks.7.ffn.0.weight"].dtype == torch.float8_e4m3fn
    assert block["blocks.7.ffn.0.weight_scale"].shape == (13824, 1)
    assert block["blocks.7.ffn.0.bias"].dtype == torch.float32
    encoder = plan.files["distill_fp8/models_t5_umt5-xxl-enc-fp8.pth"].holds
    assert encoder["token_embedding.weight"].dtype == torch.bfloat16
    assert plan.configs["distill_fp8"]["text_len"] == 512 and plan.indexed == ("distill_fp8",)


def test_parts() -> None:
    manifest = small(FORMATS[0])
    plan = plan_synth(manifest, shapes_of(manifest, ("vae",)))
    assert list(plan.files) == ["distill_fp8/Wan2.1_VAE.pth"]
    assert (plan.configs, plan.indexed, plan.tokenizer) == ({}, (), None)


def test_a_manifest_without_files_or_sizes_is_refused() -> None:
    manifest = small(FORMATS[0])
    assert manifest.source is not None
    bare = manifest.model_copy(update={"source": manifest.source.model_copy(update={"files": ()})})
    with pytest.raises(RequestError, match="names no published file for its transformer"):
        plan_of(bare)
    with pytest.raises(RequestError, match="does not state the sizes of its vae"):
        shapes_of(manifest.model_copy(update={"vae": None}), ("vae",))


# ------------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_a_matrix_keeps_the_scale_of_what_it_multiplies(dtype: torch.dtype) -> None:
    noise = noise_of(1)
    plan = {
        "m.weight": torch.empty(1500, 1024, dtype=dtype, device="meta"),
        "m.weight_scale": torch.empty(1500, 1, device="meta"),
    }
    matrix = noise.tensor("m.weight", plan["m.weight"], plan).float()
    if dtype.itemsize == 1:
        largest = {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]
        assert matrix.abs().max() == largest  # the codes fill their range, and no more
        scale = noise.tensor("m.weight_scale", plan["m.weight_scale"], plan)
        assert scale.min() > 0 and scale.unique().numel() > 1000
        matrix *= scale
    y = torch.randn(64, 1024) @ matrix.t()
    print(f"{dtype}: deviation of the product {y.std():.4f}, of its mean {y.mean():.4f}")
    assert y.std() == pytest.approx(1, rel=0.05)
    assert torch.isfinite(matrix).all()


def test_the_laws_of_small_tensors() -> None:
    noise = noise_of(1)
    for name, shape, mean, deviation in (
        ("blocks.0.modulation", (1, 6, 512), 0.0, 0.1),
        ("blocks.0.norm3.weight", (4096,), 1.0, 0.1),
        ("decoder.middle.1.norm.gamma", (2048, 1, 1), 1.0, 0.1),
        ("blocks.0.ffn.0.bias", (4096,), 0.0, 0.02),
        ("decoder.conv1.weight", (96, 16, 3, 3, 3), 0.0, (16 * 27) ** -0.5),
    ):
        found = noise.tensor(name, torch.empty(shape, device="meta"), {})
        assert found.mean() == pytest.approx(mean, abs=0.1 * (deviation or 1))
        assert found.std() == pytest.approx(deviation, rel=0.1)


def test_the_same_seed_gives_the_same_numbers_and_no_two_tensors_are_alike() -> None:
    like = torch.empty(3, 1 << 20, device="meta")
    name, next_name = "blocks.0.x.weight", "blocks.1.x.weight"
    first = noise_of(1).tensor(name, like, {})
    assert torch.equal(first, Noise(1).tensor(name, like, {}))
    pieces = [piece.clone() for piece in noise_of(1).pieces(name, like, {})]
    assert len(pieces) > 1 and torch.equal(first.reshape(-1), torch.cat(pieces))
    for other in (noise_of(1).tensor(next_name, like, {}), Noise(2).tensor(name, like, {})):
        correlation = torch.corrcoef(torch.stack([first.reshape(-1), other.reshape(-1)]))[0, 1]
        print(f"correlation {correlation:.5f}")
        assert abs(correlation) < 0.01
    rows = torch.corrcoef(first) - torch.eye(3)
    assert rows.abs().max() < 0.01  # stretches of one tensor differ too
    assert TABLE > 3 << 20


# ------------------------------------------------------------------------------------------------------- make


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_engine_runs_on_every_layout(tmp_path: Path, name: str) -> None:
    manifest = small(name)
    made = make(plan_of(manifest), tmp_path)
    assert not made.kept
    assert {path: (tmp_path / path).stat().st_size for path in made.files} == made.files
    files = open_files(manifest, tmp_path)
    with torch.inference_mode(), loaded.transformer(files, manifest) as transformer:
        encoder = load_text_encoder(files.text_encoder, manifest, "cpu", torch.float32)
        vae = load_vae(files.vae, manifest, "cpu", torch.float32)
        ids = torch.randint(2, 30, (1, 9))
        states = encoder(ids, torch.ones_like(ids, dtype=torch.bool))
        rows = torch.zeros(1, transformer.config.text_len, states.shape[-1])
        rows[:, :9] = states
        velocity = transformer(torch.randn(1, 16, 2, 4, 6), torch.tensor([900.0]), rows)
        frames = vae.decode(torch.randn(1, 16, 2, 4, 6))
    deviations = [float(t.std()) for t in (states, velocity, frames)]
    print(name, "deviations of text states, velocity, frames:", *(f"{d:.3f}" for d in deviations))
    assert all(0.02 < deviation < 20 for deviation in deviations)
    assert files.transformer.quantization == ("fp32" if name == LAYOUTS[-1] else manifest.quantization)


def test_a_finished_file_is_kept_and_the_rest_made_again(tmp_path: Path) -> None:
    plan = plan_of(small(FORMATS[0]))
    make(plan, tmp_path)
    paths = {path: tmp_path / path for path in plan.files}
    before = {path: (file.read_bytes(), file.stat().st_mtime_ns) for path, file in paths.items()}
    gone = ["distill_fp8/block_1.safetensors", "distill_fp8/models_t5_umt5-xxl-enc-fp8.pth"]
    for path in gone:
        (tmp_path / path).unlink()
    (tmp_path / "distill_fp8" / ".block_1.safetensors.part").write_bytes(b"half")  # of a killed run
    started: list[tuple[int, int]] = []
    done: list[int] = []
    made = make(plan, tmp_path, on_start=lambda *what: started.append(what), on_bytes=done.append)
    assert set(made.kept) == set(plan.files) - set(gone)
    assert started == [(sum(map(plan.size_of, gone)), 2)]
    assert sum(done) == pytest.approx(started[0][0], rel=0.1)
    for path, (content, time) in before.items():
        assert (tmp_path / path).read_bytes() == content
        assert ((tmp_path / path).stat().st_mtime_ns == time) == (path not in gone)
    assert not list(tmp_path.rglob("*.part"))
    assert make(plan, tmp_path).kept == tuple(plan.files)


def test_models_may_share_a_directory(tmp_path: Path) -> None:
    one, two = (plan_of(small(name)) for name in LAYOUTS[3:5])
    make(one, tmp_path)
    made = make(two, tmp_path)
    assert set(made.kept) == set(one.files) & set(two.files) != set()
    note = json.loads((tmp_path / NOTE_FILE).read_text())
    assert note["models"] == sorted(LAYOUTS[3:5]) and set(note["files"]) == {*one.files, *two.files}


PLACES = ["mine.safetensors", "distill_fp8/old.pth", "distill_fp8/block_0.safetensors"]


@pytest.mark.parametrize("place", PLACES)
def test_never_among_other_weights(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(b"precious")
    with pytest.raises(OutputError, match="holds weights that were not made here"):
        make(plan_of(small(FORMATS[0])), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / place]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(small(FORMATS[0]))
    make(plan, tmp_path)
    with pytest.raises(OutputError, match="random weights of seed 0; choose another place, or --seed 0"):
        make(plan, tmp_path, seed=1)
    target = tmp_path / "distill_fp8" / "block_0.safetensors"
    shutil.copy(tmp_path / "distill_fp8" / "block_1.safetensors", target)
    with pytest.raises(OutputError, match=r"block_0.safetensors is not what would be written there"):
        make(plan, tmp_path)
    target.unlink()
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="Another run is writing"):
        make(plan, tmp_path)
    os.close(handle)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"needs 0\.0 GB in .*, where 0\.0 GB are free"):
        make(plan, tmp_path)
    assert not target.exists()
    for text in ("", "[]", '{"format": 0}', '{"format": 1, "seed": true, "files": []}', "\0"):
        (tmp_path / NOTE_FILE).write_text(text)
        with pytest.raises(OutputError, match="is not the note of this program"):
            make(plan, tmp_path)


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_one_file_stops_all_and_leaves_no_half(tmp_path: Path, fault: BaseException) -> None:
    plan = plan_of(small(FORMATS[0]))
    count = 0

    def on_bytes(nbytes: int) -> None:
        nonlocal count
        count += 1
        if count == 40:
            raise fault

    with pytest.raises(OutputError if isinstance(fault, OSError) else KeyboardInterrupt):
        make(plan, tmp_path, on_bytes=on_bytes)
    assert not list(tmp_path.rglob("*.part"))
    left = [path for path in plan.files if (tmp_path / path).exists()]
    print(f"{len(left)} of {len(plan.files)} files finished before the fault")
    assert len(left) < len(plan.files)
    assert set(make(plan, tmp_path).kept) == set(left)
    open_files(small(FORMATS[0]), tmp_path)


# ---------------------------------------------------------------------------------------------------- command


def test_a_video_from_random_weights(t2v: Run, tmp_path: Path) -> None:
    place = tmp_path / "noise"
    done = t2v("weights", "synth", place, "--model", "demo-fp8")
    assert done.exit_code == 0 and done.stdout.strip() == str(place)
    assert f"t2v --model {place}" in done.stderr
    sizes = [part for name, value in tiny.SMALL.items() for part in (f"--{name}", value)]
    video = t2v("--model", place, "--device", "cpu", *sizes, "--prompt", "a red circle")
    assert video.exit_code == 0, video.output
    assert Path(video.stdout.strip()).stat().st_size > 0


def test_events(t2v: Run, tmp_path: Path) -> None:
    command = (
        "weights",
        "synth",
        tmp_path / "w",
        "--model",
        "demo",
        "--parts",
        "vae, text_encoder",
        "--json",
    )
    events = [json.loads(line) for line in t2v(*command).stdout.splitlines()]
    assert {event["event"] for event in events} == {"progress", "result"}
    progress, result = events[-2], events[-1]
    assert (progress["files_done"], progress["files"]) == (2, 2)
    assert [file["name"] for file in result["files"]] == [
        "distill_models/models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
    ]
    assert result["kept"] == 0 and result["seed"] == 0 and result["bytes"] > 1e6
    again = json.loads(t2v(*command).stdout.splitlines()[-1])
    assert again["kept"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--parts", "transformer,unet"),
            "--parts is 'transformer,unet'; expected one or more of",
        ),
        (("--parts", ","), "expected one or more of"),
        (("--model", "wan9"), "No model is called"),
        (("--seed", "-1"), "-1 is not in the range"),
    ],
)
def test_arguments(t2v: Run, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = t2v("weights", "synth", tmp_path / "w", *options)
    assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "w").exists()


def test_errors_are_sentences(t2v: Run, tmp_path: Path) -> None:
    (tmp_path / "real.safetensors").write_bytes(b"x")
    done = t2v("weights", "synth", tmp_path, "--model", "demo")
    assert done.exit_code == OutputError.exit_code and "were not made here" in done.stderr
    file = tmp_path / "file"
    file.touch()
    done = t2v("weights", "synth", file, "--model", "demo")
    assert done.exit_code == 2 and str(file) in done.stderr
    assert issubclass(OutputError, FourstepError)


def test_help_is_free_of_torch() -> None:
    code = "import sys; from entrypoint.cli import cli; import entrypoint.synth; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "pydantic", "rich", "numpy"} & set(found.stdout.split())
