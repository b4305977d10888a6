"""Whole runs for the bench: prompt to mp4 with a pipeline that is kept, and by a new process each time."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from entrypoint.account import Account
from entrypoint.events import Reporter
from entrypoint.output import Target
from entrypoint.saving import Saving
from runtime.bench.samples import Row, Sample
from runtime.bench.scene import Rows, Scene, placed
from runtime.bench.sizes import Size
from runtime.errors import FourstepError
from runtime.pipeline import Pipeline
from runtime.request import check
from runtime.schema import project_root

PHASES = ("start", "load", "text", "denoise", "decode", "other", "total")
"""Columns of both tables. start: of a process, until its plan is there; other: what no other column has, the
file that is left to write when the decode is over above all."""
_TARGETS = {"warm": {"total": "run", "other": "run other"}, "cold": {"total": "cold run"}}

Phases = Mapping[str, float]
"""Seconds by phase, `total` among them."""


class ChildFailedError(FourstepError):
    """A process that was to make a video did not; `exit_code` is its own."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code if code > 0 else 1


def warm(scene: Scene, size: Size) -> Rows:
    """The rows of the part `run`: the pipeline is there, one run is not counted."""
    pipe = scene.pipe(size)
    with tempfile.TemporaryDirectory(prefix="t2v-bench-") as place:
        path = Path(place) / "warm.mp4"
        _once(pipe, size, path)
        with scene.measuring():
            runs = [_once(pipe, size, path) for _ in range(scene.repeats)]
    scene.warm_decodes[size] = Sample(tuple(run["decode"] for run in runs))
    fell_back = f"; FELL BACK: {'; '.join(pipe.ways.fell_back)}" if pipe.ways.fell_back else ""
    yield from _rows(scene.row("run", "warm", size), runs, f"{placed(pipe)}; {pipe.ways}{fell_back}")


def _once(pipe: Pipeline, size: Size, path: Path) -> Phases:
    """One run as `t2v generate` makes it, without the loading."""
    began = time.perf_counter()
    request = size.request()
    account = Account(Reporter({}))
    target = Target(path, overwrite=True, explicit=True)
    fps = check(request, pipe.manifest, pipe.device).fps
    with Saving(target, fps, account) as saving:
        for stage in pipe.stages(request):
            saving.take(stage)
            account.stage(stage)
        assert stage.video is not None  # the last stage of a run that did not raise
        saving.save(stage.video, contact_sheet=False)
    return summed(account.timings, time.perf_counter() - began)


def summed(timings: Phases, total: float, start: float | None = None) -> Phases:
    """The columns of a run: its phases, and as `other` what is left of `total` seconds."""
    found = {phase: timings[phase] for phase in ("load", "text", "denoise", "decode") if phase in timings}
    found |= {} if start is None else {"start": start}
    return found | {"other": total - sum(found.values()), "total": total}


def cold(scene: Scene, size: Size) -> Rows:
    """The rows of the part `cold`: a process each, of which the first only fills the caches.

    Those are the page cache and that of compiled kernels. Where the part `run` came before, the last row
    compares the first decode of a process with a warm one.
    """
    scene.close()  # the GPU is the child's
    with tempfile.TemporaryDirectory(prefix="t2v-bench-") as place:
        command = command_of(scene, size, Path(place) / "cold.mp4")
        _child(command)
        with scene.measuring():
            runs = [_child(command) for _ in range(scene.repeats)]
    yield from _rows(scene.row("run", "cold", size), runs, "a process each, files in memory")
    warm = scene.warm_decodes.get(size)
    if warm is not None:
        over = Sample(tuple(run["decode"] / warm.median for run in runs))
        row = replace(scene.row("cold", "first decode over warm", size), unit="ratio", target="decode first")
        yield replace(row, found=over, note="of whole runs, kernels compiled before")


def command_of(scene: Scene, size: Size, path: Path) -> list[str]:
    """`t2v generate` for such a video, its text states computed."""
    where = scene.where
    command = [sys.executable, "-m", "entrypoint", "generate", "--json", "--overwrite", "--cache", "none"]
    options: dict[str, Any] = {
        "--model": where.model,
        "--weights": where.directory,
        "--profile": where.profile_name,
        "--device": where.device,
        "--vram": where.vram,
        "--ram": where.ram,
        "--attention": None if scene.attention == "auto" else scene.attention,
        "--height": size.height,
        "--width": size.width,
        "--frames": size.frames,
        "--output": path,
    }
    given = {name: str(value) for name, value in options.items() if value is not None}
    return command + [part for pair in given.items() for part in pair]


def _child(command: Sequence[str]) -> Phases:
    """Run a command that tells events, and time it from outside; ChildFailedError."""
    # Settings of this shell are for the bench; the child gets options.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("T2V_")}
    paths = (str(project_root()), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    began, start = time.perf_counter(), None
    events: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, env=environment, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == "plan" and start is None:
                start = time.perf_counter() - began
        code = process.wait()
        seconds = time.perf_counter() - began
        said.seek(0)
        last = (said.read().strip().splitlines() or [""])[-1]
    result = next((event for event in events if event["event"] == "result"), None)
    if code or result is None:
        message = next((event["message"] for event in events if event["event"] == "error"), last[-300:])
        raise ChildFailedError(f"The cold run ended with exit status {code}: {message}", code)
    return summed(result["timings"], seconds, start)


def _rows(row: Row, runs: Sequence[Phases], note: str) -> Rows:
    """A row for each phase that was timed."""
    targets = _TARGETS[row.what]
    for phase in PHASES:
        if phase in runs[0]:
            found = Sample(tuple(run[phase] for run in runs))
            target = targets.get(phase, "")
            said = note if phase == "total" else ""
            yield replace(row, unit="s", phase=phase, found=found, target=target, note=said)
