"""`t2v bench`: how fast this machine is at every part of a run, beside the plain way and its own ceilings.

The table goes to stdout. With --json FILE everything also goes to FILE as one JSON object (`docs/bench.md`),
written anew after every part; `-` is stdout, and then the table goes to stderr.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from entrypoint.events import tell
from entrypoint.options import (
    MODEL,
    OUTPUT,
    PATH,
    SectionedCommand,
    SectionedOption,
    attention_option,
    memory_options,
    option,
)
from runtime.errors import RequestError, first_sentence
from runtime.memory.exhausted import is_out_of_memory

if TYPE_CHECKING:
    from entrypoint.bench_page import Report
    from runtime.bench.gauge import Gauge
    from runtime.bench.scene import Rows, Scene
    from runtime.bench.sizes import Size
    from runtime.schema import ModelManifest

PARTS = ("forward", "decode", "text", "run", "determinism", "cold")
BENCH = "What to measure"
MOST_REPEATS = 1000


@click.command(cls=SectionedCommand)
@option(BENCH, "--only", "LIST", f"Of {', '.join(PARTS)}.", default=",".join(PARTS), default_text="all")
@option(BENCH, "--formats", "LIST", "Of fp8, int8, bf16: variants of --model.", default_text="--model alone")
@option(BENCH, "--sizes", "LIST", "HEIGHTxWIDTHxFRAMES,...", default_text="the model's own")
@option(
    *(BENCH, "--repeats", "N", "Times that each is measured, after a warm-up."),
    type=click.IntRange(1, MOST_REPEATS),
    default=3,
)
@option(
    *(BENCH, "--budget", "SECONDS", "Begin no part after so long."),
    type=click.FloatRange(min=0),
    default_text="none",
)
@option(
    *(MODEL, "--model", "NAME|DIR", "A name of `t2v models`, or a directory of weights."),
    default_text="wan2.1-t2v-14b-4step",
)
@option(
    *(MODEL, "--weights", "DIR", "Its files; random ones are made where there are none."),
    type=PATH,
    default_text="random ones in the temporary directory, removed at the end",
)
@option(MODEL, "--profile", "NAME|FILE", "A name of `t2v profiles`, or a YAML file.", default="auto")
@option(MODEL, "--device", "auto|cuda:N|cpu", "Where to compute.", default="auto")
@memory_options
@attention_option
@click.option(
    *("--json", "report"),
    cls=SectionedOption,
    section=OUTPUT,
    metavar="FILE",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Also write everything as JSON; - is stdout.",
)
@option(OUTPUT, "--picture", "FILE", "Also draw where a forward's time goes, as SVG.", type=PATH)
@click.option(
    *("--from", "earlier"),
    cls=SectionedOption,
    section=OUTPUT,
    metavar="FILE",
    type=PATH,
    help="Measure nothing: draw --picture from the JSON of an earlier bench.",
)
@option(OUTPUT, "--debug", None, "Show the traceback of an error.")
@click.pass_context
def bench(ctx: click.Context, debug: bool, earlier: Path | None, **given: Any) -> None:
    """Measure forwards, decodes, text states and whole runs on this machine.

    With random weights of the true shapes unless --weights has others: t2v bench --model demo
    """
    if earlier is not None:
        from entrypoint.bench_picture import redraw

        if given["picture"] is None:
            raise RequestError(
                f"--from is {earlier}, and nothing is to be drawn of it; name a file with --picture"
            )
        redraw(earlier, given["picture"])
        click.echo(given["picture"])
        return
    named = ctx.get_parameter_source("weights") == ParameterSource.COMMANDLINE
    run(**given, may_make=named)


@dataclass(frozen=True)
class Asked:
    """What to measure of every model."""

    parts: tuple[str, ...]
    sizes: "tuple[Size, ...]"  # empty: each model's own
    repeats: int
    attention: str
    budget: float | None  # seconds

    def sizes_of(self, manifest: "ModelManifest") -> "tuple[Size, ...]":
        """The sizes for a model."""
        from runtime.bench.sizes import Size

        own = manifest.defaults
        return self.sizes or (Size(own.height, own.width, own.frames),)


@dataclass(frozen=True)
class Task:
    """A part of the bench for one size of one model."""

    part: str
    size: "Size"
    rows: "Callable[[], Rows]"


def run(
    *,
    only: str,
    formats: str | None,
    sizes: str | None,
    repeats: int,
    attention: str,
    budget: float | None,
    model: str | None,
    weights: Path | None,
    profile: str,
    device: str,
    vram: float | None,
    ram: float | None,
    report: Path | None,
    picture: Path | None,
    may_make: bool,
) -> None:
    """Check what can be checked at once, then measure model after model, and show what was found.

    may_make: random weights may be written into `weights`. Raises RequestError, WeightsError, DeviceError,
    PlanError, OutputError; OutputCheckError where the same seed gave other bits. Whatever is raised, what
    was found before is shown.
    """
    from runtime.bench.sizes import read_sizes
    from runtime.device import select_device
    from runtime.profiles import DEFAULT_MODEL, load_profile
    from runtime.request import check

    parts = read_parts(only)
    if picture is not None and "forward" not in parts:
        raise RequestError(f"--picture draws a forward, which --only ({only}) leaves out; add forward to it")
    asked = Asked(*(parts, () if sizes is None else read_sizes(sizes)), repeats, attention, budget)
    chosen, place = select_device(device, load_profile(profile))
    name = model or DEFAULT_MODEL

    from entrypoint.bench_weights import models, weights_of

    found = models(name, formats, chosen)
    for manifest in found:
        for size in asked.sizes_of(manifest):
            check(size.request(), manifest, place)
    shown = _begin(asked, place, report)
    from runtime.bench.gauge import Gauge
    from runtime.bench.scene import Scene, Where
    from runtime.device import gpu_of

    gpu = gpu_of(place)
    try:
        with Gauge(None if gpu is None else gpu.uuid) as gauge:
            shown.trouble = gauge.trouble
            for number, manifest in enumerate(found):
                with weights_of(manifest, name, chosen, weights, may_make=may_make) as (exact, directory):
                    where = Where(exact, directory, chosen, profile, place, vram, ram)
                    with Scene(where, repeats, attention, gauge.during) as scene:
                        _measure(tasks(scene, asked, first=number == 0), scene, asked, shown, gauge)
    except BaseException as error:
        shown.failed = f"{type(error).__name__}: {first_sentence(error)}"
        raise
    finally:
        shown.keep()
        shown.show()
    if picture is not None:
        from entrypoint.bench_picture import write_picture

        write_picture(shown.as_dict(), picture)
    shown.check()


def read_parts(text: str) -> tuple[str, ...]:
    """`text,forward` -> ("forward", "text"); RequestError."""
    from runtime.bench.sizes import words

    given = words(text)
    if not given or set(given) - set(PARTS):
        raise RequestError(
            f"--only is {text!r}; expected one or more of {', '.join(PARTS)}, with commas between them."
        )
    return tuple(part for part in PARTS if part in given)


def _begin(asked: Asked, place: str, path: Path | None) -> "Report":
    """The report with the machine at its head; torch starts here. DeviceError, RequestError, OutputError."""
    from entrypoint.bench_page import Report
    from runtime.device import confirm_device
    from runtime.memory import allocator

    allocator.settle()
    confirm_device(place)

    from entrypoint.version import facts
    from runtime.bench.machine import card_name, describe
    from runtime.layers.backends import check_name

    check_name(asked.attention)
    program = facts()
    about = {"fourstep": f"{program['version']} ({program['revision'] or 'unknown commit'})"}
    settings = asdict(asked) | {"sizes": [str(size) for size in asked.sizes]}
    shown = Report(about | describe(place), card_name(place), settings, path)
    shown.keep()  # before minutes of measuring
    return shown


def tasks(scene: "Scene", asked: Asked, *, first: bool) -> Iterator[Task]:
    """What there is to do for one model, what says most first.

    The decode is that of the first model alone, as the VAE is the same in all. Whole runs take the first of
    the sizes; the cold ones come last, since they have the model leave the GPU.
    """
    from entrypoint import bench_runs
    from runtime.bench import decode, determinism, forward, text

    sizes = asked.sizes_of(scene.where.manifest)
    main = sizes[0]
    order: list[tuple[str, Size, Callable[[Scene, Size], Rows]]] = []
    for size in sizes:
        order += [("forward", size, forward.measure)]
        order += [("decode", size, decode.measure)] if first else []
    order += [
        ("text", main, text.measure),
        ("run", main, bench_runs.warm),
        ("determinism", main, determinism.measure),
        ("cold", main, bench_runs.cold),
    ]
    for part, size, measure in order:
        if part in asked.parts:
            yield Task(part, size, partial(measure, scene, size))


def _measure(todo: Iterator[Task], scene: "Scene", asked: Asked, shown: "Report", gauge: "Gauge") -> None:
    """Do one task after the other until there is no time left; what does not fit the memory is passed by."""
    from entrypoint.bench_page import Gauged
    from runtime.bench.gauge import summarize

    model = scene.where.manifest.name
    for task in todo:
        what = f"{model} {task.size} {task.part}"
        if asked.budget is not None and time.time() - shown.began > asked.budget:
            shown.left_out.append(f"{what}: the {asked.budget:g} s of --budget are over")
            continue
        tell(f"{what} ...")
        began = time.perf_counter()
        with gauge.during() as whole:
            trouble = _collect(task, scene, shown)
        readings = scene.take_readings() or whole
        if trouble:
            shown.left_out.append(f"{what}: {trouble}")
        seconds = time.perf_counter() - began
        shown.gauged.append(Gauged(model, str(task.size), task.part, seconds, summarize(readings)))
        shown.trouble = gauge.trouble
        shown.keep()
        shown.show_rows()  # a run that is cut short has said so much


def _collect(task: Task, scene: "Scene", shown: "Report") -> str:
    """Take a task's rows as they come; why it ended early, where memory ran out, else ""."""
    try:
        for row in task.rows():
            shown.rows.append(row)
        return ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_sentence(error)
    # Outside of the handler, whose traceback would keep alive what was allocated.
    scene.close()
    return f"out of memory ({reason})"
