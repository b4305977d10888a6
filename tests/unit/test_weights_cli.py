"""`t2v weights` from the shell, with a model that a hub on this machine publishes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import profiles
from runtime.schema import ModelManifest, PublishedFile
from runtime.weights import shelf
from runtime.weights.pull import PullReporter
from tests.conftest import Run
from tests.hub import Hub, cut, status, wrong
from tests.unit.weights_fixtures import REPOSITORY, contents, manifest, model

A, B, T5, CONFIG = model()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def ship(monkeypatch: pytest.MonkeyPatch, *manifests: ModelManifest) -> None:
    """Let the program ship these manifests besides its own."""
    known, load = profiles.list_manifests(), profiles.load_manifest
    own = {one.name: one for one in manifests}
    monkeypatch.setattr(profiles, "list_manifests", lambda: sorted([*known, *own]))
    monkeypatch.setattr(profiles, "load_manifest", lambda name: own.get(name) or load(name))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> dict[str, bytes]:
    """The model `tiny`, published and shipped; its files."""
    hub.publish(REPOSITORY, model())
    ship(monkeypatch, manifest(model()))
    return model()


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_pull_generate(hub: Hub, t2v: Run, small: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The whole way: publish a checkpoint, download it, verify it, make a video with it."""
    names = [path for path in tiny_checkpoint.rglob("*") if path.is_file()]
    files = {path.relative_to(tiny_checkpoint).as_posix(): path.read_bytes() for path in names}
    wanted = [name for name in files if name.startswith(("distill_fp8/", "google/"))]
    hub.publish(REPOSITORY, files)
    with pytest.MonkeyPatch.context() as patch:
        ship(patch, manifest(wanted))
        hub.misbehave(wanted[0], cut(100))
        result = t2v("weights", "pull", "--model", "tiny", "--weights", tmp_path / "w")
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"{tmp_path / 'w'}\n"
        assert "tiny is complete and verified: " in result.stderr
        assert contents(tmp_path / "w") == {name: files[name] for name in wanted}
        assert t2v("weights", "verify", "--weights", tmp_path / "w", "--full").exit_code == 0
    made = small("--output", tmp_path / "a.mp4", model=tmp_path / "w")
    assert made.exit_code == 0, made.stderr
    assert (tmp_path / "a.mp4").stat().st_size > 1000


def test_pull_again(hub: Hub, tiny: dict[str, bytes], t2v: Run, tmp_path: Path) -> None:
    arguments = ("weights", "pull", "--model", "tiny", "--weights", tmp_path)
    assert t2v(*arguments).exit_code == 0
    asked = len(hub.asked)
    result = t2v(*arguments)
    assert result.exit_code == 0
    assert "tiny was complete already: 4 files" in result.stderr
    assert len(hub.asked) == asked


def test_pull_json(hub: Hub, tiny: dict[str, bytes], t2v: Run, tmp_path: Path) -> None:
    result = t2v("weights", "pull", "--model", "tiny", "--weights", tmp_path, "--json")
    told = events(result.stdout)
    assert [one["file"] for one in told if one["event"] == "file"] == list(tiny)
    total = sum(map(len, tiny.values()))
    assert next(one for one in told if one["event"] == "plan")["missing"] == total
    assert [one for one in told if one["event"] == "progress"][-1]["bytes"] == total
    assert told[-1]["event"] == "result"
    assert told[-1]["received"] == total
    assert told[-1]["directory"] == str(tmp_path)


def test_pull_failure(hub: Hub, tiny: dict[str, bytes], t2v: Run, tmp_path: Path) -> None:
    hub.misbehave(A, wrong(7))
    result = t2v("weights", "pull", "--model", "tiny", "--weights", tmp_path, "--json")
    assert result.exit_code == 3
    assert "arrived broken" in result.stderr
    assert events(result.stdout)[-1] | {"message": ""} == {
        "event": "error",
        "code": 3,
        "kind": "WeightsError",
        "message": "",
    }
    assert t2v("weights", "pull", "--model", "tinny").exit_code == 2


def test_dry_run(hub: Hub, tiny: dict[str, bytes], t2v: Run, tmp_path: Path) -> None:
    (tmp_path / "w" / "tiny_fp8").mkdir(parents=True)
    (tmp_path / "w" / A).write_bytes(tiny[A])
    arguments = ("weights", "pull", "--model", "tiny", "--weights", tmp_path / "w", "--dry-run")
    result = t2v(*arguments)
    assert result.exit_code == 0
    lines = [line.split(maxsplit=3) for line in result.stdout.splitlines()]
    assert lines[0] == ["FILE", "SIZE", "STATE"]
    assert lines[1] == [A, "60.1", "kB", "there, to be verified"]
    assert lines[2] == [B, "40.1", "kB", "need"]
    assert lines[-1][0] == "total"
    assert not hub.bodies()
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["tiny_fp8"]
    hub.misbehave("api", status(404, X_Error_Code="RepoNotFound"))
    assert t2v(*arguments).exit_code == 3


def test_dry_run_without_a_hub(t2v: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    name = "wan2.1-t2v-14b-4step-fp8"
    result = t2v("weights", "pull", "--model", name, "--weights", tmp_path / "w", "--dry-run")
    assert "sizes are approximate: The hub at nowhere" in result.stderr
    assert result.stdout.splitlines()[-1].split()[:4] == ["total", "about", "22.3", "GB"]
    assert not (tmp_path / "w").exists()


def test_demo_needs_nothing(t2v: Run, tmp_path: Path) -> None:
    result = t2v("weights", "pull", "--model", "demo", "--weights", tmp_path / "w")
    assert result.exit_code == 0
    assert "demo ships with the program" in result.stderr
    result = t2v("weights", "verify", "--model", "demo")
    assert result.exit_code == 0
    assert "Wan2.1_VAE" in result.stdout


def test_a_family_asks_for_a_variant(t2v: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from runtime import device

    monkeypatch.setattr(device, "select_device", lambda asked, profile: (profile, "cpu"))
    result = t2v("weights", "pull", "--weights", tmp_path)
    assert result.exit_code == 2
    assert "several variants" in result.stderr
    assert "wan2.1-t2v-14b-4step-fp8" in result.stderr
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    result = t2v("weights", "pull", "--weights", tmp_path, "--profile", "rtx3090", "--dry-run")
    assert "distill_int8/block_0.safetensors" in result.stdout


def test_verify(hub: Hub, tiny: dict[str, bytes], t2v: Run, tmp_path: Path) -> None:
    t2v("weights", "pull", "--model", "tiny", "--weights", tmp_path)
    for name in (A, T5):
        (tmp_path / name).chmod(0o644)
    (tmp_path / A).write_bytes(tiny[A][:-1])
    data = bytearray(tiny[T5])
    data[3_000] ^= 1  # neither size nor header tell
    (tmp_path / T5).write_bytes(data)
    (tmp_path / CONFIG).unlink()
    result = t2v("weights", "verify", "--weights", tmp_path)
    assert result.exit_code == 3
    states = {line.split()[0]: line.split()[3:] for line in result.stdout.splitlines() if "tiny_fp8" in line}
    assert states[A][0] == "wrong"
    assert f"is {len(tiny[A]) - 1} bytes long, expected {len(tiny[A])}" in result.stdout
    assert states[B] == states[T5] == ["ok"]
    assert "2 files of tiny missing or wrong" in result.stderr
    assert f"t2v weights pull --model tiny --weights {tmp_path}" in result.stderr
    result = t2v("weights", "verify", "--model", "tiny", "--weights", tmp_path, "--full", "--json")
    assert result.exit_code == 3
    told = {one["file"]: one for one in events(result.stdout) if one["event"] == "file"}
    assert told[T5]["state"] == "wrong"
    assert "expected" in told[T5]["reason"]
    assert told[CONFIG]["state"] == "missing"
    assert told[B]["sha256"] is not None
    assert t2v("weights", "pull", "--model", "tiny", "--weights", tmp_path).exit_code == 0
    assert contents(tmp_path) == tiny
    assert t2v("weights", "verify", "--model", "tiny", "--weights", tmp_path, "--full").exit_code == 0


def test_verify_nothing(t2v: Run, tmp_path: Path) -> None:
    result = t2v("weights", "verify", "--weights", tmp_path)
    assert result.exit_code == 3
    assert "No model lies in" in result.stderr
    result = t2v("weights", "verify", "--weights", tmp_path, "--model", "wan2.1-t2v-1.3b")
    assert result.exit_code == 3
    assert "remove" not in result.stderr


def test_list(
    hub: Hub, tiny: dict[str, bytes], t2v: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2V_WEIGHTS", str(tmp_path))

    def state(name: str) -> str:
        return next(
            line.split(maxsplit=1)[1]
            for line in t2v("weights", "list").stdout.splitlines()
            if line.startswith(name)
        )

    assert state("tiny ").startswith("absent")
    hub.misbehave(A, cut(10_000), status(400))
    assert t2v("weights", "pull", "--model", "tiny", "--workers", 1).exit_code == 3
    assert state("tiny ").startswith("partial")
    t2v("weights", "pull", "--model", "tiny")
    assert state("tiny ").startswith("present  ")
    assert state("tiny ").endswith(str(tmp_path))
    assert state("wan2.1-t2v-14b-4step-fp8 ").startswith("absent")
    assert state("demo ").startswith("present")
    told = {one["model"]: one for one in events(t2v("weights", "list", "--json").stdout)}
    assert told["tiny"]["bytes"] == told["tiny"]["total"] == sum(map(len, tiny.values()))
    (tmp_path / T5).unlink()
    assert state("tiny ").startswith("partial")


def test_a_shared_file_makes_no_model_partial(tmp_path: Path) -> None:
    shared, own = PublishedFile(path="google/tokenizer.json"), PublishedFile(path=A)
    one, two = (
        manifest([], name=name, files=(shared, own_file))
        for name, own_file in (("one", own), ("two", PublishedFile(path=B)))
    )
    for name in (A, "google/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    first, second = shelf([one, two], tmp_path)
    assert (first.state, first.verified) == ("present", False)
    assert second.state == "absent"


def test_missing_weights_name_the_command(t2v: Run, tmp_path: Path) -> None:
    name = "wan2.1-t2v-14b-4step-fp8"
    sizes = ("--device", "cpu", "--height", 96, "--width", 96, "--frames", 5)
    for directory in (tmp_path / "no where", tmp_path):
        result = t2v("--model", name, "--weights", directory, *sizes)
        assert result.exit_code == 3
        quoted = f"'{directory}'" if " " in str(directory) else str(directory)
        assert f"`t2v weights pull --model {name} --weights {quoted}`" in result.stderr


def test_the_library_waits_until_it_is_needed() -> None:
    code = "import runtime.weights, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(found.stdout.split())
    assert "runtime.weights.pull" in loaded
    assert not loaded & {"torch", "huggingface_hub", "httpx", "httpx2", "safetensors"}
    assert PullReporter  # what a program of one's own derives from
