"""`t2v version`: which program this is, in an image and outside of one."""

import json
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest

from entrypoint import surroundings, version
from tests.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
IMAGE = {"tag": "cu128", "revision": "a" * 40, "architectures": ["8.9", "12.0"], "kernels": {"sage": "2.2.0"}}


def test_outside_of_an_image(t2v: Run) -> None:
    said = json.loads(t2v("version", "--json").stdout)
    assert said["image"] is None
    assert said["packages"]["torch"] == installed("torch") and said["packages"]["av"] == installed("av")
    assert said["version"] == t2v("--version").stdout.split()[-1]


def test_in_an_image_its_own_description_counts(
    t2v: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image.json").write_text(json.dumps(IMAGE))
    monkeypatch.setattr(surroundings, "DESCRIPTION", tmp_path / "image.json")
    said = json.loads(t2v("version", "--json").stdout)
    assert said["image"] == IMAGE and said["revision"] == "a" * 40
    lines = t2v("version").stdout.splitlines()
    assert any(line.split() == ["image", "cu128"] for line in lines)
    assert any(line.split() == ["built", "for", "8.9,", "12.0"] for line in lines)


def test_a_checkout_names_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import schema

    monkeypatch.setattr(schema, "project_root", lambda: tmp_path)
    assert version._git_revision() is None  # no repository
    git = [
        "git",
        "-C",
        str(tmp_path),
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
    ]
    (tmp_path / "file").write_text("one")
    for command in (["init", "--quiet"], ["add", "file"], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert version._git_revision() == commit
    (tmp_path / "file").write_text("two")
    assert version._git_revision() == f"{commit}-dirty"


def test_it_answers_without_torch() -> None:
    code = "import sys; from entrypoint.version import facts; facts(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
