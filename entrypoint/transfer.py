"""What `t2v weights` shows: plans and verdicts as tables, a transfer as a bar or lines, all of it as JSON."""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click

from entrypoint.events import emit, tell
from entrypoint.table import aligned, count, duration
from runtime.errors import WeightsError
from runtime.schema import ModelManifest
from runtime.weights import FileCheck, Plan, Progress, Pulled, PullReporter, note_damage, shelf, verify
from runtime.weights.plan import Item, decimal
from runtime.weights.progress import Meter

LINE_SECONDS = 5.0
JSON_SECONDS = 1.0
INTERRUPTED = "what has arrived is kept: run the same command again to continue."


class TransferReporter(PullReporter):
    """A reporter with a beginning and an end; `result` follows the end."""

    def __init__(self, *, dry_run: bool) -> None:
        self.dry_run = dry_run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt) and not self.dry_run:
            tell(INTERRUPTED)

    def result(self, pulled: Pulled) -> None:
        """It is done."""


class JsonTransfer(TransferReporter):
    """Events, as `entrypoint.weights` describes them."""

    _told = 0.0

    def notice(self, message: str) -> None:
        tell(message)
        emit("notice", message=message)

    def plan(self, plan: Plan) -> None:
        for item in plan.items:
            emit(
                "file",
                model=plan.model,
                file=item.file.target,
                state=item.state,
                bytes=item.bytes,
                missing=item.missing,
            )
        emit(
            "plan", model=plan.model, bytes=plan.total, missing=plan.missing, free=plan.free, exact=plan.exact
        )

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._told >= JSON_SECONDS or progress.files_done == progress.files:
            self._told = now
            emit("progress", **{name: _rounded(value) for name, value in vars(progress).items()})

    def result(self, pulled: Pulled) -> None:
        fields = vars(pulled) | {"directory": str(pulled.directory.absolute()), "dry_run": self.dry_run}
        emit("result", **fields)


class LineTransfer(TransferReporter):
    """For logs: the plan in a line, then a line every few seconds."""

    _told = 0.0

    def notice(self, message: str) -> None:
        tell(message)

    def plan(self, plan: Plan) -> None:
        if self.dry_run:
            show_plan(plan)
            return
        tell(
            f"{plan.model}: {count(len(plan.items), 'file')}, {decimal(plan.total)}; {decimal(plan.missing)} "
            f"to download into {plan.directory}, where {decimal(plan.free)} are free"
        )

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS:
            self._told = now
            click.echo(describe(progress), err=True)

    def result(self, pulled: Pulled) -> None:
        if self.dry_run:
            return
        if pulled.files == 0:
            tell(f"{pulled.model} ships with the program; there is nothing to download.")
        else:
            before = "was complete already" if pulled.complete_before else "is complete and verified"
            tell(f"{pulled.model} {before}: {count(pulled.files, 'file')}, {decimal(pulled.bytes)}")
        click.echo(pulled.directory)


class LiveTransfer(LineTransfer):
    """For terminals: one bar over all files."""

    def __init__(self, *, dry_run: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskID, TextColumn
        from rich.progress import Progress as Bars

        super().__init__(dry_run=dry_run)
        columns = (BarColumn(bar_width=32), TextColumn("{task.fields[told]}"))
        self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
        self._task: TaskID | None = None

    def progress(self, progress: Progress) -> None:
        if self._task is None:
            self._bars.start()
            self._task = self._bars.add_task("", total=progress.total or 1, told="")
        self._bars.update(self._task, completed=progress.bytes, told=describe(progress))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        super().__exit__(kind, error, trace)


def make_reporter(*, as_json: bool, dry_run: bool) -> TransferReporter:
    """The reporter that suits where stderr goes."""
    if as_json:
        return JsonTransfer(dry_run=dry_run)
    return (LiveTransfer if sys.stderr.isatty() else LineTransfer)(dry_run=dry_run)


def describe(progress: Progress) -> str:
    """`3.2 of 22.3 GB, 9/46 files, 45.1 MB/s, 7 min 04 s left`."""
    parts = [
        f"{decimal(progress.bytes)} of {decimal(progress.total)}",
        f"{progress.files_done}/{progress.files} files",
    ]
    if progress.rate is not None:
        parts.append(f"{decimal(progress.rate)}/s")
    if progress.eta is not None and progress.eta >= 1:
        parts.append(f"{duration(progress.eta)} left")
    return ", ".join(parts)


def show_plan(plan: Plan) -> None:
    """The table of a dry run, on stdout."""
    about = "" if plan.exact else "about "
    rows = [(item.file.target, about + decimal(item.bytes), _state(item)) for item in plan.items]
    rows.append(("total", about + decimal(plan.total), f"{decimal(plan.missing)} to download"))
    _table(("FILE", "SIZE", "STATE"), rows, right=[1])
    tell(f"{plan.directory} has {decimal(plan.free)} free")


def _state(item: Item) -> str:
    words = {
        "have": "have",
        "check": "there, to be verified",
        "link": f"have, as {item.twin}",
        "part": f"need, {decimal(item.arrived)} have arrived",
        "need": "need",
        "none": "not published, not needed",
    }
    return words[item.state]


def check(manifests: Sequence[ModelManifest], directory: Path, *, full: bool, as_json: bool) -> None:
    """Verify models and tell the verdict on each file; WeightsError if any is missing or wrong."""
    bad: list[tuple[ModelManifest, list[FileCheck], bool]] = []
    for manifest in manifests:
        checks = _watched(manifest, directory, full=full, quiet=as_json)
        noted = note_damage(manifest, directory, checks)
        faults = [one for one in checks if one.state != "ok"]
        if faults or not checks:
            bad.append((manifest, faults, noted))
        _show_checks(manifest, checks, full=full, as_json=as_json)
    for manifest, faults, noted in bad:
        raise WeightsError(_advice(manifest, directory, faults, noted))


def _watched(manifest: ModelManifest, directory: Path, *, full: bool, quiet: bool) -> list[FileCheck]:
    """`verify`, with its progress on a terminal."""
    if not full or quiet or not sys.stderr.isatty():
        return verify(manifest, directory, full=full)
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    total = next(one.bytes for one in shelf([manifest], directory))
    meter = Meter(total, 0)
    columns = (BarColumn(bar_width=32), TextColumn("{task.fields[told]}"))
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=total, told="")

        def advance(nbytes: int) -> None:
            meter.add(nbytes)
            bars.update(task, completed=meter.received, told=f"{decimal(meter.received)} of {decimal(total)}")

        return verify(manifest, directory, full=True, on_bytes=advance)


def _show_checks(manifest: ModelManifest, checks: Sequence[FileCheck], *, full: bool, as_json: bool) -> None:
    if as_json:
        for one in checks:
            fields = {"state": one.state, "bytes": one.bytes, "sha256": one.sha256, "reason": one.reason}
            emit("file", model=manifest.name, file=one.target, **fields)
        emit(
            "result",
            model=manifest.name,
            ok=bool(checks) and all(one.state == "ok" for one in checks),
            full=full,
        )
        return
    rows = [
        (one.target, "-" if one.bytes is None else decimal(one.bytes), f"{one.state} {one.reason}".rstrip())
        for one in checks
    ]
    _table((manifest.name, "SIZE", "STATE"), rows, right=[1])
    unknown = [one for one in checks if full and one.state == "ok" and not one.pinned]
    if unknown and manifest.embedded is None:
        tell(
            f"{count(len(unknown), 'file')} had no digest to be compared with; `t2v weights pull` notes them."
        )


def _advice(manifest: ModelManifest, directory: Path, faults: Sequence[FileCheck], noted: bool) -> str:
    if manifest.embedded is not None:
        return f"{manifest.name} ships with the program and is damaged; install the program again."
    first = f", first {faults[0].path} ({faults[0].reason or faults[0].state})" if faults else ""
    before = "" if noted or all(one.state == "missing" for one in faults) else "remove what is wrong, then "
    return (
        f"{count(len(faults), 'file')} of {manifest.name} missing or wrong{first}; {before}fetch them: "
        f"t2v weights pull --model {manifest.name} --weights {directory}"
    )


def show_shelf(manifests: Sequence[ModelManifest], directory: Path, *, as_json: bool) -> None:
    """Which models are there, as a table or as JSON."""
    found = shelf(manifests, directory)
    if as_json:
        for one in found:
            emit("model", **vars(one) | {"where": str(one.where), "missing": list(one.missing)})
        return
    rows = []
    for one in found:
        size = (
            decimal(one.total) if one.state != "partial" else f"{decimal(one.bytes)} of {decimal(one.total)}"
        )
        where = "-" if one.state == "absent" else str(one.where)
        state = one.state if one.verified or one.state != "present" else "present, not verified"
        rows.append((one.model, state, size, where))
    _table(("MODEL", "STATE", "SIZE", "WHERE"), rows, right=[2])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    first, *others = aligned(header, rows, right=right, width=width)
    click.secho(first, bold=True)
    for line in others:
        click.echo(line)


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value
