"""`t2v weights convert`: weights from one format or layout to another, and what that costs each matrix.

With --json, stdout has events as `entrypoint.events` describes them. Its own are

    {"event": "stage",  "phase": "convert", "step": int, "steps": 100,     percent of the bytes to read
                        "seconds": float, "eta": float|null,
                        "bytes": int, "rate": float}                       read, and in a second
    {"event": "result", "path": str, "kind": str, "from": str, "to": str, "layout": str,
                        "seconds": float, "bytes": int,                    of all files
                        "files": [{"name": str, "bytes": int, "sha256": str}],
                        "kept": int,                                       files of an earlier, broken run
                        "errors": [{"kind": str, "count": int, "mean": float, "median": float, "max": float}],
                        "worst": [LAYER, ...]}                             ten, as --report FILE has them all
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entrypoint.events import emit, tell, tell_warning
from entrypoint.options import OUTPUT, PATH, SectionedCommand, option, talk_options, together
from entrypoint.table import aligned, count, duration, size
from runtime.errors import OutputError

if TYPE_CHECKING:
    from runtime.checkpoint.conversion import Conversion
    from runtime.checkpoint.making import Outcome

FORMAT, SOURCE = "Format", "Source"
LINE_SECONDS = 5.0
WORST = 10

convert_options = together(
    option(
        *(FORMAT, "--to", None, "Of the block matrices; fp8 is e4m3. 8 bits: one scale per output channel."),
        type=click.Choice(["fp8", "int8", "bf16"]),
        required=True,
    ),
    option(
        *(FORMAT, "--layout", None, "A directory with a file for each block, or one file."),
        type=click.Choice(["blocks", "single"]),
        default_text="single if TARGET ends like a file",
    ),
    option(
        *(FORMAT, "--scale-dtype", None, "Of the scales."),
        type=click.Choice(["fp32", "bf16"]),
        default="fp32",
    ),
    option(
        *(FORMAT, "--other-dtype", None, "Of what is not quantized: norms, biases, embeddings."),
        type=click.Choice(["keep", "bf16", "fp32"]),
        default="keep",
    ),
    option(
        *(SOURCE, "--kind", None, "Which model SOURCE is."),
        type=click.Choice(["transformer", "text_encoder", "vae"]),
        default_text="found from its tensors",
    ),
    option(OUTPUT, "--report", "FILE", "Write the error of every matrix as JSON.", type=PATH),
    option(OUTPUT, "--overwrite", None, "Replace weights that TARGET holds."),
)


@click.command(cls=SectionedCommand, context_settings={"auto_envvar_prefix": "T2V"})
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@convert_options
@talk_options
def convert(source: Path, target: Path, json: bool, debug: bool, **given: Any) -> None:
    """Write weights in another format or layout.

    SOURCE is a file or a directory: safetensors, shards, blocks, .pth; Wan's names or diffusers'. TARGET is a
    directory of blocks, a .safetensors file, or for a text encoder or VAE also a .pth file. One tensor is in
    memory at a time. A conversion into blocks that was broken off goes on when the same command runs again.
    """
    import torch

    from runtime.checkpoint.conversion import plan_conversion
    from runtime.checkpoint.making import convert as make

    report: Path | None = given["report"]
    overwrite: bool = given["overwrite"]
    if report is not None and report.exists() and not overwrite:
        raise OutputError(f"{report} exists already; choose another name or add --overwrite.")
    dtypes = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
    plan = plan_conversion(
        source,
        target,
        given["to"],
        layout=given["layout"],
        kind=given["kind"],
        scale_dtype=dtypes[given["scale_dtype"]] or torch.float32,
        other_dtype=dtypes[given["other_dtype"]],
    )
    begun = time.perf_counter()
    with _progress(plan, as_json=json) as progress:
        outcome = make(plan, overwrite=overwrite, on_start=progress.start, on_bytes=progress.advance)
    if report is not None:
        _write_report(report, plan, outcome)
    _show(plan, outcome, time.perf_counter() - begun, as_json=json)


class Progress:
    """Bytes read, of how many, how fast, and how long it will take."""

    def __init__(self, summary: str) -> None:
        self.summary = summary
        self.total = self.done = 0
        self.begun = time.perf_counter()

    def start(self, total: int, kept: int) -> None:
        """The work begins; total: bytes to read, kept: files that need no work."""
        tell(self.summary)
        if kept:
            tell(f"{count(kept, 'finished file')} of an earlier run {'is' if kept == 1 else 'are'} kept.")
        self.total, self.begun = total, time.perf_counter()

    def advance(self, nbytes: int) -> None:
        """A tensor is done."""
        self.done += nbytes
        self.tell()

    def tell(self) -> None:
        """Show the state."""

    def stop(self) -> None:
        """The work is over, well or not."""

    @property
    def percent(self) -> int:
        """0 to 100."""
        return 100 * self.done // max(self.total, 1)

    @property
    def seconds(self) -> float:
        """Since the work began; never 0."""
        return max(time.perf_counter() - self.begun, 1e-6)

    @property
    def rate(self) -> float:
        """Bytes in a second, so far."""
        return self.done / self.seconds

    @property
    def left(self) -> float | None:
        """Seconds until the end at this rate; None before there is one."""
        return (self.total - self.done) / self.rate if self.done else None


class JsonProgress(Progress):
    """An event for each percent."""

    told = -1

    def start(self, total: int, kept: int) -> None:
        """The work begins; nothing is said to people."""
        self.total, self.begun = total, time.perf_counter()

    def tell(self) -> None:
        """Emit it, if the percentage is a new one."""
        if self.percent == self.told:
            return
        self.told = self.percent
        state = {"seconds": round(self.seconds, 3), "eta": None if self.left is None else round(self.left, 3)}
        emit(
            "stage",
            phase="convert",
            step=self.percent,
            steps=100,
            **state,
            bytes=self.done,
            rate=round(self.rate, 1),
        )


class LineProgress(Progress):
    """A line now and then, for logs."""

    told = 0.0

    def tell(self) -> None:
        """Print it, if there was none for some seconds or the work is done."""
        if self.done < self.total and self.seconds - self.told < LINE_SECONDS:
            return
        self.told = self.seconds
        pace = f"{size(round(self.rate))}/s, {duration(self.left or 0.0)} left"
        click.echo(f"convert {self.percent}%, {size(self.done)} of {size(self.total)}, {pace}", err=True)


class BarProgress(Progress):
    """A bar on a terminal; it goes when the work is over."""

    def __init__(self, summary: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        super().__init__(summary)
        columns = (TextColumn("convert"), BarColumn(bar_width=32), DownloadColumn(binary_units=True))
        left = TextColumn("{task.fields[left]}", style="progress.remaining")
        self.bars = Bars(*columns, TransferSpeedColumn(), left, console=Console(stderr=True), transient=True)
        self.task = self.bars.add_task("convert", total=None, left="")

    def start(self, total: int, kept: int) -> None:
        """Show the bar."""
        super().start(total, kept)
        self.bars.update(self.task, total=total)
        self.bars.start()

    def tell(self) -> None:
        """Move it."""
        left = "" if self.left is None else f"{duration(self.left)} left"
        self.bars.update(self.task, completed=self.done, left=left)

    def stop(self) -> None:
        """Take the bar away."""
        self.bars.stop()


@contextmanager
def _progress(plan: "Conversion", *, as_json: bool) -> Iterator[Progress]:
    """What shows the work, after the notes about it; it ends before anything else is printed."""
    for note in plan.notes:
        tell_warning(note)
        if as_json:
            emit("warning", message=note)
    formats = f"{plan.source.quantization} -> {plan.recipe.quantization}"
    files = f"{count(len(plan.files), 'file')}, {size(plan.nbytes)} in {plan.target}"
    show = JsonProgress if as_json else BarProgress if sys.stderr.isatty() else LineProgress
    progress: Progress = show(f"{plan.recipe.kind} {formats}, {files}")
    try:
        yield progress
    except KeyboardInterrupt:
        if plan.layout == "blocks":
            tell("finished files are kept; the same command goes on with the others.")
        raise
    finally:
        progress.stop()


def _write_report(path: Path, plan: "Conversion", outcome: "Outcome") -> None:
    import torch

    from runtime.checkpoint.report import as_json
    from runtime.checkpoint.write import write_json

    recipe = plan.recipe
    scale = {torch.float32: "fp32", torch.bfloat16: "bf16"}[recipe.scale_dtype] if recipe.form else None
    about = {"source": str(plan.source.path), "target": str(plan.target), "kind": recipe.kind}
    how = {"from": plan.source.quantization, "to": recipe.quantization, "scale_dtype": scale}
    write_json(path, about | how | {"files": _files(outcome)} | as_json(outcome.layers))


def _files(outcome: "Outcome") -> list[dict[str, Any]]:
    return [
        {"name": name, "bytes": made.bytes, "sha256": made.sha256} for name, made in outcome.files.items()
    ]


def _show(plan: "Conversion", outcome: "Outcome", seconds: float, *, as_json: bool) -> None:
    """The result: tables on stderr and the path on stdout, or the event."""
    from runtime.checkpoint.report import by_kind, worst

    nbytes = sum(made.bytes for made in outcome.files.values())
    summaries, layers = by_kind(outcome.layers), worst(outcome.layers, WORST)
    if as_json:
        emit(
            "result",
            path=str(plan.target.absolute()),
            kind=plan.recipe.kind,
            **{"from": plan.source.quantization, "to": plan.recipe.quantization},
            layout=plan.layout,
            seconds=round(seconds, 3),
            bytes=nbytes,
            files=_files(outcome),
            kept=outcome.kept,
            errors=[asdict(summary) for summary in summaries],
            worst=[asdict(layer) for layer in layers],
        )
        return
    rows = [
        [
            layer.name,
            _percent(layer.error),
            f"{_percent(layer.worst_row_error)} (row {layer.worst_row})",
            "-" if layer.largest_scale is None else f"{layer.largest_scale:.3g}",
            str(layer.saturated),
        ]
        for layer in layers
    ]
    header = ["worst matrices", "RMS error", "worst row", "largest scale", "saturated"]
    _table(header, rows, right=(1, 2, 3, 4))
    kinds = [[s.kind, str(s.count), _percent(s.mean), _percent(s.median), _percent(s.max)] for s in summaries]
    _table(["kind of matrix", "count", "mean", "median", "max"], kinds, right=(1, 2, 3, 4))
    click.echo(f"{count(len(outcome.files), 'file')}, {size(nbytes)}, {duration(seconds)}", err=True)
    click.echo(plan.target)


def _percent(error: float) -> str:
    return f"{100 * error:.3f} %"


def _table(header: list[str], rows: list[list[str]], right: tuple[int, ...]) -> None:
    if not rows:  # a VAE has no matrices
        return
    first, *others = aligned(header, rows, right=right)
    for line in (click.style(first, bold=True), *others, ""):
        click.echo(line, err=True)
