"""Real processes, killed at chosen moments: the run file is whole, and what goes on from it ends the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from entrypoint.run_file import in_use, read_run
from runtime.video import read_frames
from tests.conftest import Run
from tests.tiny import PROMPTS, SMALL

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds for whatever a busy machine takes; nothing here is synchronised by time

# Stops for good at a chosen moment, and says so, as a slow machine might.
STOPPED = """
import itertools, json, os, sys, time
from entrypoint import interrupt
from entrypoint.cli import main

def stop(*_, **__):
    print(json.dumps({"event": "stopped"}), flush=True)
    while True:
        time.sleep(3600)

def deaf(*_, **__):
    # A lock that is taken twice: a wait in C that no signal ends, like one for the GPU.
    import ctypes
    print(json.dumps({"event": "stopped"}), flush=True)
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)

def at_call(number, honest, then):
    calls = itertools.count(1)
    return lambda *args, **named: then() if next(calls) == number else honest(*args, **named)

moment = sys.argv.pop(1)
if moment == "text":
    from runtime.text_encoder import TextEncoder
    TextEncoder.forward = stop
elif moment in ("step", "deaf"):
    from runtime.transformer import Transformer
    Transformer.velocity = at_call(3, Transformer.velocity, stop if moment == "step" else deaf)
elif moment == "decode":
    from runtime import frames
    frames.decode_pieces = stop
elif moment == "writing":  # the bytes are there, and neither synced nor named
    os.fsync = at_call(5, os.fsync, stop)  # two calls a file: the third file, that of step 1
interrupt.GRACE = 0.5
main()
"""


_expected: list[np.ndarray] = []  # frames of the run that nobody ended; made once


@pytest.fixture
def start(tiny_checkpoint: Path, workplace: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(moment): a run of its own that stops there; returns when it has."""
    running = []

    def run(moment: str) -> subprocess.Popen[str]:
        sizes = [str(part) for name, value in SMALL.items() for part in (f"--{name}", value)]
        model = ["--model", str(tiny_checkpoint), "--device", "cpu", "--cache", "none", *sizes]
        what = ["--prompt", PROMPTS[1], "--output", "fox.mp4", "--json"]
        process = subprocess.Popen(
            [sys.executable, "-c", STOPPED, moment, *model, *what],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None and process.stderr is not None
        if not any(json.loads(line)["event"] == "stopped" for line in process.stdout):
            raise AssertionError(process.stderr.read())
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("moment", "done"), [("text", None), ("writing", 0), ("step", 2), ("decode", 4)], ids=str
)
def test_killed(
    start: Callable[..., subprocess.Popen[str]], small: Run, t2v: Run, moment: str, done: int | None
) -> None:
    process = start(moment)
    run = Path("fox.run.safetensors")
    assert in_use(run)
    process.kill()
    assert process.wait(timeout=PATIENCE) == -signal.SIGKILL
    assert not in_use(run)
    point = read_run(run).point
    assert (None if point is None else point.step) == done
    partial = [path for path in Path().iterdir() if path.name.endswith(".partial")]
    assert len(partial) == (moment == "writing")

    resumed = t2v("resume", run)
    assert resumed.exit_code == 0, resumed.output
    assert sorted(path.name for path in Path().iterdir()) == ["fox.mp4"]
    if not _expected:
        assert small("--prompt", PROMPTS[1], "--output", "expected.mp4").exit_code == 0
        _expected.append(read_frames("expected.mp4"))
    assert (read_frames("fox.mp4") == _expected[0]).all()


def test_a_signal_ends_a_run_that_waits_for_the_gpu(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("deaf")
    begun = time.monotonic()
    process.terminate()
    stdout, stderr = process.communicate(timeout=PATIENCE)
    print(f"left after {time.monotonic() - begun:.1f} s")
    assert process.returncode == 130 and time.monotonic() - begun < 10
    assert "the run is kept after step 2 of 4" in stderr.splitlines()[-1]
    last = json.loads(stdout.splitlines()[-1])
    assert (last["event"], last["code"]) == ("error", 130)
    assert last["run_file"] == str(Path("fox.run.safetensors").absolute())
    point = read_run(Path("fox.run.safetensors")).point
    assert point is not None and point.step == 2 and not in_use(Path("fox.run.safetensors"))
