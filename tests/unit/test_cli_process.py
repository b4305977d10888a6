"""`t2v` as a process of its own: signals, pipes, exit codes, and what a quick answer does not import."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from entrypoint.latents import read_latents
from runtime.video import read_frames
from tests.tiny import SMALL

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds for a start on a busy machine; nothing here takes long by itself
PROMPT_EXIT = 10  # seconds from a signal to the end, of which Python's own teardown takes one or two


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "entrypoint", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("T2V_")}
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    settings["T2V_CACHE"] = "none"
    return clean | settings | extra


def small(model: Path, *arguments: object) -> list[str]:
    sizes = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    return command("--model", model, "--device", "cpu", *sizes, *arguments)


def run(arguments: list[str], place: Path, **extra: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=place, env=environment(), capture_output=True, text=True, timeout=PATIENCE, **extra
    )


def test_stdout_has_the_path_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run(small(tiny_checkpoint, "--output", "fox.mp4"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fox.mp4\n"
    assert "denoise 4/4" in done.stderr
    assert len(read_frames(tmp_path / "fox.mp4")) == SMALL["frames"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--no-such-option"], 2),
        (["--model", "demo", "--frames", "80"], 2),
        (["--weights", "/nowhere"], 3),
        (["--model", "demo", "--device", "cuda:99"], 5),
    ],
)
def test_exit_codes_reach_the_shell(tmp_path: Path, arguments: list[str], code: int) -> None:
    done = run(command(*arguments), tmp_path)
    assert done.returncode == code
    assert done.stdout == "" and done.stderr.startswith("t2v: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["--version"],
        ["profiles"],
        ["models", "demo"],
        ["--model", "demo", "--height", "481"],
        ["--model", "demo", "--output", "x.avi"],
    ],
)
def test_quick_answers_import_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from entrypoint.cli import cli\n"
        f"try: cli.main({arguments!r})\n"
        "except SystemExit: pass\n"
        "sys.stderr.write('\\nMODULES ' + ' '.join(sys.modules))"
    )
    done = run([sys.executable, "-c", code], tmp_path)
    loaded = set(done.stderr.split("MODULES ")[1].split())
    assert "click" in loaded
    assert "torch" not in loaded
    if "--help" in arguments:
        assert not loaded & {"rich", "av", "numpy", "pydantic", "yaml"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("as_json", [False, True])
def test_interrupted_while_denoising(
    tiny_checkpoint: Path, tmp_path: Path, number: signal.Signals, as_json: bool
) -> None:
    many = [
        "--steps",
        1000,
        "--accept-nonstandard",
        "--height",
        192,
        "--width",
        320,
        "--output",
        "here/fox.mp4",
    ]
    process = subprocess.Popen(
        small(tiny_checkpoint, *many, *(["--json"] if as_json else [])),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    heard = []
    for line in process.stdout if as_json else process.stderr:
        heard.append(line)
        if "denoise 1/" in line or '"phase": "denoise"' in line:
            break
    process.send_signal(number)
    begun = time.monotonic()
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, (heard, stderr)
    assert time.monotonic() - begun < PROMPT_EXIT
    first, second = stderr.splitlines()[-2:]
    assert first == "t2v: interrupted; nothing half-written is left." and "Traceback" not in stderr
    assert second.startswith("t2v: the run is kept after step ")
    assert second.endswith("t2v resume here/fox.run.safetensors")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["fox.run.safetensors"]
    if as_json:
        last = json.loads(stdout.splitlines()[-1])
        assert (last["event"], last["code"], last["kind"]) == ("error", 130, "Interrupted")
        assert last["run_file"] == str(tmp_path / "here/fox.run.safetensors") and "latents" not in last
    else:
        assert stdout == ""


def test_a_write_that_fails_half_way_keeps_the_latents(tiny_checkpoint: Path, tmp_path: Path) -> None:
    limit = 50_000  # bytes a file: more than the run file has, less than the video

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    sizes = ("--height", 64, "--width", 96, "--frames", 17)
    done = run(small(tiny_checkpoint, *sizes, "--output", "fox.mp4"), tmp_path, preexec_fn=lower)
    assert done.returncode == 2, done.stderr
    assert "t2v: error: " in done.stderr and "fox.mp4" in done.stderr
    assert "t2v resume fox.run.safetensors" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["fox.run.safetensors"]
    assert read_latents(tmp_path / "fox.run.safetensors").latents.shape == (16, 5, 8, 12)


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path: Path) -> None:
    reader = subprocess.run(
        f"{sys.executable} -m entrypoint profiles | head -1",
        shell=True,
        cwd=tmp_path,
        env=environment(PYTHONUNBUFFERED="1"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert reader.stdout.startswith("NAME") and "Traceback" not in reader.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run(command("--model", "demo", "--height", 481, "--debug"), tmp_path)
    assert done.returncode == 2 and "Traceback" in done.stderr and "RequestError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("t2v: error: height is 481")
