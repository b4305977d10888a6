"""What a run tells its caller: the reporter that all verbs speak to, and its JSON form.

With `--json`, stdout carries one JSON object a line, flushed as it is written, and stderr nothing but
warnings and errors. Every object has "event"; a reader must ignore events and keys that it does not know.

    {"event": "run",     "run_file": str}             where the run is kept until its video is there; once
                                                      more if the place changes
    {"event": "stage",   "phase": "load"|"text"|"denoise"|"decode"|"save",
                         "step": int, "steps": int,   pieces of the phase done, and in all (load: percent)
                         "seconds": float,            since the phase began
                         "eta": float|null,           seconds until it ends, at its pace so far
                         "bytes": int}                weights read (load), or made: latents, frames, mp4
    {"event": "plan", ...}                            where everything will lie, as `t2v plan --json` has it
    {"event": "warning", "message": str}
    {"event": "result",  "path": str,                 the video, as an absolute path
                         "latents": str, "contact_sheet": str,      only if they were written
                         "model": str, "seed": int|null,
                         "width": int, "height": int, "frames": int, "fps": int,
                         "seconds": float,            the whole run, loading included
                         "timings": {phase: seconds},
                         "peak_memory": {phase: {"ram": bytes, "vram": bytes|null}}}
                         ram: of the process, up to the end of the phase; vram: within the phase
    {"event": "error",   "code": int,                 the exit code
                         "kind": str,                 RequestError, WeightsError, ... UsageError, Interrupted
                         "message": str,
                         "run_file": str,             only if the run can go on: `t2v resume RUN_FILE`
                         "latents": str}              only if it failed late: a file that `t2v decode` reads

A run ends with exactly one "result" or "error", which is its last line; `t2v resume DIRECTORY` is several
runs. A "stage" of denoise is told when its step is on the disk.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from runtime.memory.plan import Plan
    from runtime.pipeline import Stage


@dataclass(frozen=True)
class Peak:
    """Memory, bytes; None for a GPU that was not used."""

    ram: int  # resident in this process, from its start to the end of the phase
    vram: int | None  # that torch took from the driver, within the phase


@dataclass(frozen=True)
class Result:
    """A finished run; the fields of the "result" event."""

    path: Path
    model: str
    seed: int | None
    width: int
    height: int
    frames: int
    fps: int
    seconds: float
    timings: dict[str, float]
    peak_memory: dict[str, Peak]
    latents: Path | None = None
    contact_sheet: Path | None = None

    def event(self) -> dict[str, Any]:
        """The fields as JSON has them: absolute paths, milliseconds, no key for what was not written."""
        event = asdict(self) | {"path": str(self.path.absolute()), "seconds": round(self.seconds, 3)}
        for key in ("latents", "contact_sheet"):
            path = event.pop(key)
            if path is not None:
                event[key] = str(path.absolute())
        event["timings"] = {phase: round(seconds, 3) for phase, seconds in self.timings.items()}
        return event


class Reporter:
    """What a run speaks to; a context manager, so that a live display ends before anything else is printed.

    This base class says nothing. `phases` are those to come, in order, with their pieces.
    """

    def __init__(self, phases: dict[str, int]) -> None:
        self.phases = phases

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, summary: str) -> None:
        """The run begins; `summary` says in a line what will be made, for people."""

    def run_file(self, path: Path) -> None:
        """The run is kept in `path` from now on."""

    def plan(self, plan: "Plan") -> None:
        """Where everything will lie, before it is loaded."""

    def stage(self, stage: "Stage") -> None:
        """A piece of work is done."""

    def warn(self, message: str) -> None:
        """Something that the user should know and that does not stop the run."""

    def result(self, result: Result) -> None:
        """The run is done."""


class JsonReporter(Reporter):
    """Events on stdout, as the head of this file describes them; warnings for people on stderr too."""

    def plan(self, plan: "Plan") -> None:
        emit("plan", **plan.as_dict())

    def run_file(self, path: Path) -> None:
        emit("run", run_file=str(path.absolute()))

    def stage(self, stage: "Stage") -> None:
        emit(
            "stage",
            phase=stage.phase,
            step=stage.step,
            steps=stage.steps,
            seconds=round(stage.seconds, 3),
            eta=None if stage.eta is None else round(stage.eta, 3),
            bytes=stage.bytes,
        )

    def warn(self, message: str) -> None:
        tell_warning(message)
        emit("warning", message=message)

    def result(self, result: Result) -> None:
        emit("result", **result.event())


def emit(event: str, **fields: Any) -> None:
    """One JSON object on one line of stdout, flushed: the reader may be waiting for it."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def tell(message: str, label: str = "", colour: str | None = None) -> None:
    """A sentence for people, on stderr: `t2v: LABEL: message`, the label in colour on a terminal."""
    prefix = click.style(f"{label}:", fg=colour, bold=True) + " " if label else ""
    click.echo(f"t2v: {prefix}{message}", err=True)


def tell_warning(message: str) -> None:
    """A warning, on stderr."""
    tell(message, "warning", "yellow")
