"""Where videos, latents and contact sheets go, and what happens when there is no room for them."""

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from entrypoint import output
from entrypoint.latents import read_latents
from entrypoint.table import GAP, aligned, duration, size
from runtime import frames, video, whole_file
from runtime.errors import RequestError
from runtime.video import read_frames, read_metadata
from tests.conftest import Run

FOX = ("--prompt", "A red fox")


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_default_names_are_free_names(small: Run, workplace: Path) -> None:
    names = [small(*FOX).stdout.strip() for _ in range(3)]
    assert names == [f"outputs/a-red-fox-42{number}.mp4" for number in ("", "-2", "-3")]
    assert sorted(p.name for p in (workplace / "outputs").iterdir()) == sorted(Path(n).name for n in names)


def test_the_container_has_its_own_directory(
    small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = tmp_path / "outputs"
    volume.mkdir()
    monkeypatch.setattr(output, "CONTAINER_OUTPUTS", volume)
    assert small(*FOX).stdout == f"{volume}/a-red-fox-42.mp4\n"


def test_a_directory_as_output(small: Run, tmp_path: Path) -> None:
    assert small(*FOX, "--output", tmp_path).stdout == f"{tmp_path}/a-red-fox-42.mp4\n"
    assert small(*FOX, "--output", tmp_path).stdout == f"{tmp_path}/a-red-fox-42-2.mp4\n"


def test_overwrite(small: Run, workplace: Path) -> None:
    (workplace / "fox.mp4").write_bytes(b"old")
    result = small("--output", "fox.mp4", "--overwrite", "--save-latents", "--contact-sheet")
    assert result.exit_code == 0 and result.stdout == "fox.mp4\n"
    assert len(read_frames("fox.mp4")) == 5
    assert small("--output", "fox.mp4", "--overwrite", "--save-latents", "--contact-sheet").exit_code == 0
    assert sorted(path.name for path in workplace.iterdir()) == [
        "fox.latents.safetensors",
        "fox.mp4",
        "fox.png",
    ]


def test_a_name_taken_meanwhile(small: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = video.check_output

    def another_run_is_faster(path: Path, *rest: Any) -> Path:
        checked = honest(path, *rest)
        if not path.exists():
            path.write_bytes(b"another's")
        return checked

    with monkeypatch.context() as patched:
        patched.setattr(video, "check_output", another_run_is_faster)
        result = small(*FOX, "--output", "fox.mp4")
    assert result.exit_code == 2 and "exists" in result.stderr
    assert (workplace / "fox.mp4").read_bytes() == b"another's"
    assert read_latents(workplace / "fox.run.safetensors").prompt == "A red fox"


def test_saved_latents(small: Run, t2v: Run, workplace: Path, tiny_checkpoint: Path) -> None:
    result = small(*FOX, "--save-latents", "--seed", 9, "--output", "fox.mp4", "--fps", 8)
    assert result.exit_code == 0, result.output
    with safe_open("fox.latents.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["latents"]
        latents, metadata = file.get_tensor("latents"), file.metadata()
    assert latents.dtype == torch.float32 and latents.shape == (16, 2, 4, 6)
    assert 0.1 < latents.std() < 10
    assert metadata == {
        "format": "t2v-latents",
        "prompt": "A red fox",
        "seed": "9",
        "fps": "8",
        "sampler": "lcm",
        "model": str(tiny_checkpoint),
        "step": "4",
        "steps": "4",
    }
    decoded = t2v("decode", "fox.latents.safetensors", "--device", "cpu")
    assert decoded.exit_code == 0 and decoded.stdout == "outputs/fox.mp4\n"
    assert (read_frames("outputs/fox.mp4") == read_frames("fox.mp4")).all()
    made = read_metadata("outputs/fox.mp4")
    assert (made["prompt"], made["seed"], made["decoded_from"]["step"]) == ("A red fox", 9, "4")
    assert sorted(path.name for path in workplace.iterdir()) == [
        "fox.latents.safetensors",
        "fox.mp4",
        "outputs",
    ]


def test_latents_are_saved_before_the_decode(
    small: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()

    def pieces(*_: object) -> None:
        seen.update(path.name for path in workplace.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(frames, "decode_pieces", pieces)
    assert small("--output", "fox.mp4", "--save-latents").exit_code == 130
    assert seen == {"fox.latents.safetensors", "fox.run.safetensors"}
    assert {path.name for path in workplace.iterdir()} == seen


def test_latents_know_their_model(small: Run, t2v: Run, tiny_checkpoint: Path) -> None:
    assert small("--save-latents", "--output", "fox.mp4").exit_code == 0
    file = "fox.latents.safetensors"
    standing = t2v("decode", file, "--device", "cpu", env={"T2V_MODEL": "no/such/model"})
    assert standing.exit_code == 0, standing.output
    asked = t2v("decode", file, "--device", "cpu", "--model", "no/such/model")
    assert asked.exit_code == 2 and "no/such/model" in asked.stderr


def test_decode_says_what_it_cannot_read(t2v: Run, tmp_path: Path, tiny_checkpoint: Path) -> None:
    good = torch.randn(16, 2, 4, 6)
    cases = {
        "text": b"not a tensor",
        "empty": b"",
        "other": {"weights": good},
        "flat": {"latents": good[0]},
        "channels": {"latents": good[:4]},
        "integers": {"latents": good.to(torch.int32)},
        "nothing": {"latents": good[:, :0]},
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, path)
        with pytest.raises(RequestError, match=name):
            read_latents(path)
        result = t2v("decode", path, "--model", tiny_checkpoint)
        assert result.exit_code == 2 and path.name in result.stderr and result.stdout == ""
    assert t2v("decode", tmp_path / "absent").exit_code == 2


def test_foreign_latents_need_no_metadata(t2v: Run, tmp_path: Path, tiny_checkpoint: Path) -> None:
    save_file({"latents": torch.randn(16, 1, 4, 6).half()}, tmp_path / "x.safetensors")
    result = t2v(
        "decode", tmp_path / "x.safetensors", "--model", tiny_checkpoint, "--output", "x.mp4", "--fps", 4
    )
    assert result.exit_code == 0, result.output
    assert read_frames("x.mp4").shape == (1, 32, 48, 3)


def test_decode_warns_of_unfinished_latents(t2v: Run, tmp_path: Path, tiny_checkpoint: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"latents": torch.randn(16, 1, 4, 6)}, file, {"step": "2", "steps": "4"})
    result = t2v("decode", file, "--model", tiny_checkpoint, "--output", "x.mp4")
    assert result.exit_code == 0 and "holds step 2 of 4" in result.stderr


def test_contact_sheet(small: Run, workplace: Path) -> None:
    assert small("--output", "fox.mp4", "--contact-sheet").exit_code == 0
    assert (workplace / "fox.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------- no room


def test_a_full_disk_keeps_the_latents(small: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_encode", no_space)
    result = small("--output", "fox.mp4")
    assert result.exit_code == 2 and "disk" in result.stderr and "full" in result.stderr
    assert "t2v resume fox.run.safetensors" in result.stderr
    assert [path.name for path in workplace.iterdir()] == ["fox.run.safetensors"]


def _full_but_below(place: Path | None, honest: Any) -> Any:
    """`whole_file` on a disk that is full half-way through every file, but for those below `place`."""

    @contextmanager
    def full(path: Path) -> Iterator[Any]:
        with honest(path) as file:
            yield file
            if place is None or not path.is_relative_to(place):
                file.truncate(file.tell() // 2)
                no_space()

    return full


def test_what_is_kept_goes_elsewhere_when_its_place_is_full(
    small: Run, t2v: Run, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    expected = small("--output", "expected.mp4")
    assert expected.exit_code == 0
    honest = whole_file.whole_file
    with monkeypatch.context() as full:
        full.setattr(video, "_encode", no_space)
        full.setattr(whole_file, "whole_file", _full_but_below(spare, honest))
        result = small("--output", "fox.mp4", "--save-latents")
    kept = spare / "fox.run.safetensors"
    assert result.exit_code == 2 and f"t2v resume {kept}" in result.stderr
    warned = [line for line in result.stderr.splitlines() if "warning: " in line]
    assert len(warned) == 2 and f"the run is kept in {kept}" in warned[0] and "the latents are" in warned[1]
    assert read_latents(kept).step == 4
    assert [path.name for path in workplace.iterdir()] == ["expected.mp4"]

    assert t2v("resume", kept).stdout == f"{workplace}/fox.mp4\n"  # where it was to go
    assert (read_frames("fox.mp4") == read_frames("expected.mp4")).all()
    assert [path.name for path in spare.iterdir()] == ["fox.latents.safetensors"]


def test_no_place_at_all_does_not_stop_the_video(
    small: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.setattr(whole_file, "whole_file", _full_but_below(None, whole_file.whole_file))
    result = small("--output", "fox.mp4", "--save-latents")
    assert result.exit_code == 0, result.output
    warned = [line for line in result.stderr.splitlines() if "warning: " in line]
    assert len(warned) == 3  # run file, text states, latents: each once
    assert "the run could not be kept" in warned[0] and "the latents could not be saved" in warned[2]
    assert [path.name for path in workplace.iterdir()] == ["fox.mp4"]
    monkeypatch.setattr(video, "_encode", no_space)
    lost = small("--output", "other.mp4")
    assert lost.exit_code == 2 and "t2v resume" not in lost.stderr
    assert [path.name for path in workplace.iterdir()] == ["fox.mp4"]


def test_a_small_disk_is_told_before_anything_runs(small: Run, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        result = small("--output", disk / "fox.mp4")
        assert result.exit_code == 2 and "MiB free" in result.stderr
        assert "denoise" not in result.stderr and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ------------------------------------------------------------------------------------------ names and tables


@given(text=st.text(max_size=400))
def test_any_prompt_makes_a_file_name(text: str) -> None:
    name = output.slug(text)
    assert name and "/" not in name and "\0" not in name and not name.startswith((".", "-"))
    assert len(f"{name}-{2**63}-1000.latents.safetensors".encode()) <= 255
    assert output.slug(text) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A red fox, running!", "a-red-fox-running"),
        ("../../etc/passwd", "etc-passwd"),
        ("Ein Bär im Schnee", "ein-bär-im-schnee"),
        ("雪の中を走る狐", "雪の中を走る狐"),
        ("!!!", "video"),
        ("many words " * 40, "many-words-many-words-many-words-many-words-many-words-many"),
    ],
)
def test_names_are_the_words_of_the_prompt(text: str, name: str) -> None:
    assert output.slug(text) == name


def test_long_words_without_spaces_are_cut_at_a_letter() -> None:
    assert output.slug("雪" * 100) == "雪" * (output.SLUG_BYTES // 3)


def test_tables_align() -> None:
    rng = np.random.default_rng(5)
    rows = [["x" * n, "9" * m, "some words of a description"] for n, m in rng.integers(1, 12, (6, 2))]
    lines = aligned(["NAME", "N", "WHAT"], rows, right=[1])
    assert len({line.index("some") for line in lines[1:]}) == 1 == len(GAP) - 1
    assert all(line[: line.index("some")].rstrip().endswith("9") for line in lines[1:])
    narrow = aligned(["NAME", "N", "WHAT"], rows, right=[1], width=50)
    assert len(narrow) > len(lines) and max(map(len, narrow)) <= 50


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (61.24, "61.2 s"), (119.99, "120.0 s"), (725.4, "12 min 05 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1 << 20, "1.0 MiB"), (14_050_918_400, "13.1 GiB")]
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
