"""The reporters for people, on stderr: bars on a terminal, one line a step elsewhere, a table at the end."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

from entrypoint.events import JsonReporter, Reporter, Result, tell, tell_warning
from entrypoint.table import aligned, count, duration, size

if TYPE_CHECKING:
    from runtime.memory.plan import Plan
    from runtime.pipeline import Stage

TITLES = {
    "load": "load weights",
    "text": "read prompt",
    "denoise": "denoise",
    "decode": "decode",
    "save": "write video",
}
LINE_SECONDS = 5.0  # between two lines of a phase of many pieces


def make_reporter(phases: dict[str, int], *, as_json: bool) -> Reporter:
    """The reporter that suits where stderr goes."""
    if as_json:
        return JsonReporter(phases)
    return LiveReporter(phases) if sys.stderr.isatty() else LineReporter(phases)


class HumanReporter(Reporter):
    """What both displays share: the line before, warnings, and the table at the end."""

    def start(self, summary: str) -> None:
        tell(summary)

    def plan(self, plan: "Plan") -> None:
        vram = f"{size(plan.vram)} of GPU memory and " if plan.vram else ""
        expected = f"expected: {vram}{size(plan.ram)} of RAM, {duration(plan.total_seconds)}"
        tell(f"plan: {plan.reason} ({expected})")

    def warn(self, message: str) -> None:
        tell_warning(message)

    def result(self, result: Result) -> None:
        for line in summary(result):
            click.echo(line, err=True)
        click.echo(result.path)


class LineReporter(HumanReporter):
    """One line a step, for logs."""

    def __init__(self, phases: dict[str, int]) -> None:
        super().__init__(phases)
        self._told: dict[str, float] = {}  # seconds into a phase of many pieces, when it was last told

    def stage(self, stage: "Stage") -> None:
        done = f"{stage.step}/{stage.steps}"
        if stage.phase in ("load", "save"):
            since = stage.seconds - self._told.get(stage.phase, 0.0)
            if stage.step < stage.steps and since < LINE_SECONDS:
                return
            self._told[stage.phase] = stage.seconds
        if stage.phase == "load":
            done = f"{stage.step}%, {size(stage.bytes)}"
        left = f", {duration(stage.eta)} left" if stage.eta else ""
        title = TITLES.get(stage.phase, stage.phase)
        click.echo(f"{title} {done}, {duration(stage.seconds)}{left}", err=True)


class LiveReporter(HumanReporter):
    """A bar for each phase, the running one with its clock; they go when the run is over."""

    def __init__(self, phases: dict[str, int]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__(phases)
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="progress.remaining"),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks = {
            phase: self._bars.add_task(
                TITLES.get(phase, phase), start=False, visible=False, total=steps, left=""
            )
            for phase, steps in phases.items()
        }
        self._begin(next(iter(phases)))

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def warn(self, message: str) -> None:
        # Through the display's own console, which prints above the bars and not into them.
        from rich.markup import escape

        self._bars.console.print(f"t2v: [bold yellow]warning:[/] {escape(message)}", highlight=False)

    def stage(self, stage: "Stage") -> None:
        left = f"{duration(stage.eta)} left" if stage.eta else ""
        self._bars.update(self._tasks[stage.phase], total=stage.steps, completed=stage.step, left=left)
        if stage.step == stage.steps:
            self._bars.stop_task(self._tasks[stage.phase])
            later = [*self.phases][[*self.phases].index(stage.phase) + 1 :]
            if later:
                self._begin(later[0])

    def _begin(self, phase: str) -> None:
        self._bars.start_task(self._tasks[phase])
        self._bars.update(self._tasks[phase], visible=True)


def summary(result: Result) -> list[str]:
    """The table of phases, and one line about the video."""
    gpu = any(peak.vram is not None for peak in result.peak_memory.values())
    rows = []
    for phase, seconds in [*result.timings.items(), ("total", result.seconds)]:
        peaks = [result.peak_memory[phase]] if phase != "total" else [*result.peak_memory.values()]
        ram, vram = max(peak.ram for peak in peaks), max(peak.vram or 0 for peak in peaks)
        memory = [size(ram), size(vram)] if gpu else [size(ram)]
        rows.append([TITLES.get(phase, phase), duration(seconds), *memory])
    header = ["phase", "time", "peak RAM", *(["peak VRAM"] if gpu else [])]
    lines = aligned(header, rows, right=range(1, 4))
    lines[0] = click.style(lines[0], bold=True)
    seed = "" if result.seed is None else f", seed {result.seed}"
    length = f"{count(result.frames, 'frame')}, {result.frames / result.fps:.1f} s at {result.fps} fps"
    about = f"{result.width}x{result.height}, {length}; {result.model}{seed}"
    beside = [
        f"{name}: {path}"
        for name, path in (("latents", result.latents), ("contact sheet", result.contact_sheet))
        if path is not None
    ]
    return [*lines, "", about, *beside]
