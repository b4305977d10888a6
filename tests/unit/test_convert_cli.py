"""`t2v weights convert`: what it prints and writes, and a video from what it made."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from entrypoint import convert as verb
from runtime.checkpoint import open_checkpoint
from runtime.video import read_frames
from tests import tiny
from tests.conftest import Run


def converted(t2v: Run, source: Path, target: Path, *more: object) -> Result:
    result = t2v("weights", "convert", source, target, *more)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.parametrize(("form", "layout"), [("fp8", "blocks"), ("int8", "single")])
def test_a_video_from_converted_weights(
    small: Run, t2v: Run, tiny_checkpoint: Path, tmp_path: Path, form: str, layout: str
) -> None:
    source, model = tiny_checkpoint / "distill_models", tmp_path / "model"
    place = model / f"distill_{form}"
    target = place if layout == "blocks" else place / "transformer.safetensors"
    done = converted(t2v, source, target, "--to", form)
    assert done.stdout == f"{target}\n"
    encoder = f"models_t5_umt5-xxl-enc-{form}.pth"
    converted(t2v, source / "models_t5_umt5-xxl-enc-bf16.pth", place / encoder, "--to", form)
    shutil.copy(source / "Wan2.1_VAE.pth", place)
    shutil.copytree(tiny_checkpoint / "google", model / "google")
    assert open_checkpoint(place / encoder, "text_encoder").quantization == form
    for name, weights, seed in (("made", model, 42), ("exact", source, 42), ("other", model, 7)):
        video = small("--output", f"{name}.mp4", "--seed", seed, model=weights)
        assert video.exit_code == 0, video.stderr
    made, exact, other = (read_frames(Path(f"{n}.mp4")).astype(float) for n in ("made", "exact", "other"))
    assert len(made) == tiny.SMALL["frames"]
    near, far = np.abs(made - exact).mean(), np.abs(made - other).mean()
    print(f"{form}: {near:.1f} of 255 from the bf16 video, {far:.1f} from that of another seed")
    assert near < far / 4


def test_the_tables(t2v: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = converted(
        t2v, tiny_checkpoint / "distill_models", tmp_path / "out", "--to", "int8", "--report", report
    )
    lines = done.stderr.splitlines()
    said = json.loads(report.read_text())
    assert lines[0].startswith("t2v: transformer bf16 -> int8, 3 files, ")
    assert lines[1].startswith("convert 100%, ") and "/s, " in lines[1] and lines[1].endswith(" left")
    layers = sorted(said["layers"], key=lambda layer: -layer["error"])
    assert len(layers) == 20
    top = lines.index(next(line for line in lines if line.startswith("worst matrices")))
    for layer, line in zip(layers[:10], lines[top + 1 : top + 11], strict=True):
        assert line.split()[:2] == [layer["name"], f"{100 * layer['error']:.3f}"]
        assert f"(row {layer['worst_row']})" in line and line.endswith(f" {layer['saturated']}")
    assert len({len(line) for line in lines[top : top + 11]}) == 1  # aligned
    kinds = {line.split()[0]: line.split()[1:] for line in lines[top + 13 : top + 23]}
    assert kinds.keys() == {entry["kind"] for entry in said["by_kind"]} and len(kinds) == 10
    assert {words[0] for words in kinds.values()} == {"2"}
    assert lines[-1].startswith("3 files, ")
    assert (said["from"], said["to"], said["scale_dtype"]) == ("bf16", "int8", "fp32")


def test_the_report_is_right(t2v: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report, target = tmp_path / "report.json", tmp_path / "x.safetensors"
    source = tiny_checkpoint / "distill_models" / "distill_model.safetensors"
    converted(t2v, source, target, "--to", "fp8", "--report", report, "--scale-dtype", "bf16")
    before, after = load_file(source), load_file(target)
    said = json.loads(report.read_text())
    for layer in said["layers"]:
        name = layer["name"]
        scale = after[f"{name}.weight_scale"].float()
        w = after[f"{name}.weight"].double() * scale.double()
        given = before[f"{name}.weight"].double()
        rows = (w - given).norm(dim=1) / given.norm(dim=1)
        assert layer["shape"] == list(given.shape)
        assert layer["error"] == pytest.approx(float((w - given).norm() / given.norm()), rel=1e-4)
        assert layer["worst_row_error"] == pytest.approx(float(rows.max()), rel=1e-4)
        assert layer["largest_scale"] == float(scale.max())
        assert layer["saturated"] == int((given.abs() > 448 * (1 + 1e-6) * scale).sum())
    assert any(layer["saturated"] for layer in said["layers"])  # scales that bf16 rounded down
    again = t2v("weights", "convert", source, tmp_path / "y.safetensors", "--to", "fp8", "--report", report)
    assert again.exit_code == 2 and "report.json exists already" in again.stderr
    assert not (tmp_path / "y.safetensors").exists()


def test_events(t2v: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source, target = tiny_checkpoint / "distill_fp8", tmp_path / "out"
    done = converted(t2v, source, target, "--to", "int8", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in (events[0], events[-1])] == ["warning", "result"]
    assert done.stderr == f"t2v: warning: {events[0]['message']}\n"
    stages = [event for event in events if event["event"] == "stage"]
    steps = [event["step"] for event in stages]
    assert steps == sorted(set(steps)) and steps[-1] <= 100 and len(steps) > 5
    assert {(event["phase"], event["steps"]) for event in stages} == {("convert", 100)}
    assert all(event["rate"] > 0 and event["eta"] >= 0 and event["seconds"] > 0 for event in stages)
    result = events[-1]
    assert Path(result["path"]) == target and (result["from"], result["to"]) == ("fp8", "int8")
    sizes = {file["name"]: file["bytes"] for file in result["files"]}
    assert sizes == {path.name: path.stat().st_size for path in target.glob("*.safetensors")}
    assert sum(sizes.values()) == result["bytes"] and result["kept"] == 0
    assert len(result["worst"]) == 10 and len(result["errors"]) == 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0notjson!", "not JSON"),
        ("x.safetensors", b"", "0 bytes long"),
        ("x.gguf", b"GGUF", "GGUF file, which is not supported"),
        ("x.txt", b"text", "unknown ending"),
        ("x.pth", b"PK\x03\x04text", "truncated, corrupt or not a torch file"),
        ("other.safetensors", None, "holds weights of no known model|is not known"),
    ],
)
def test_sources_that_are_none(t2v: Run, tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content is None:
        save_file({"a.weight": torch.rand(2, 2)}, path)
    else:
        path.write_bytes(content)
    result = t2v("weights", "convert", path, tmp_path / "out", "--to", "fp8")
    assert result.exit_code == 3, result.stderr
    assert any(part in result.stderr for part in message.split("|")) and name in result.stderr
    assert not (tmp_path / "out").exists()


def test_existing_output_and_wrong_arguments(t2v: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint / "distill_models"
    converted(t2v, source, tmp_path / "out", "--to", "fp8")
    again = t2v("weights", "convert", source, tmp_path / "out", "--to", "fp8")
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    converted(t2v, source, tmp_path / "out", "--to", "fp8", "--overwrite")
    assert t2v("weights", "convert", source, tmp_path / "z").exit_code == 2  # --to is missing
    wrong = t2v("weights", "convert", source, tmp_path / "z.pth", "--to", "fp8")
    assert wrong.exit_code == 2 and "safetensors" in wrong.stderr
    wrong = t2v("weights", "convert", source, tmp_path / "z", "--to", "fp8", "--kind", "text_encoder")
    assert wrong.exit_code == 2 and "ends in .safetensors or .pth" in wrong.stderr


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(verb.time, "perf_counter", lambda: now[0])
    progress = verb.LineProgress("about")
    progress.start(1000 << 20, 2)
    for seconds, megabytes in ((2, 100), (4, 100), (4, 300), (10, 500)):
        now[0] += seconds
        progress.advance(megabytes << 20)
    about, kept, *lines = capsys.readouterr().err.splitlines()
    assert (about, kept) == ("t2v: about", "t2v: 2 finished files of an earlier run are kept.")
    assert lines == [
        "convert 20%, 200.0 MiB of 1.0 GiB, 33.3 MiB/s, 24.0 s left",  # others came too soon
        "convert 100%, 1.0 GiB of 1.0 GiB, 50.0 MiB/s, 0.0 s left",
    ]


def test_the_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    progress = verb.BarProgress("about")
    progress.start(1000, 0)
    progress.advance(500)
    task = progress.bars.tasks[0]
    assert (task.completed, task.total) == (500, 1000) and task.fields["left"].endswith(" left")
    progress.stop()
    assert "about" in capsys.readouterr().err
