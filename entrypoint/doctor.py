"""`t2v doctor`: what this machine has, what is wrong with it, and the fix for each.

With --json, stdout has one object a line:

    {"event": "finding", "name": str, "state": "ok"|"warn"|"fail",
                         "found": str, "fix": str,                       fix: "" for ok
                         "table": [{column: str}]}                       only where there is one
    {"event": "result",  "ok": bool, "warnings": int, "failures": int}

Exit code: 0 if nothing fails, 5 if torch, driver or GPU do, 3 if weights do, 2 if outputs cannot be written.
"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from entrypoint.events import emit, tell
from entrypoint.options import MODEL, PATH, SectionedCommand, option, talk_options
from entrypoint.table import aligned, count
from runtime.errors import DeviceError, OutputError, WeightsError

if TYPE_CHECKING:
    from entrypoint.findings import Finding, Scene, Table

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(cls=SectionedCommand)
@option(MODEL, "--model", "NAME|DIR", "Check this model's files.", default_text="every model in --weights")
@option(MODEL, "--weights", "DIR", "Where files of models lie.", type=PATH, default="/weights")
@talk_options
def doctor(model: str | None, weights: Path, json: bool, debug: bool) -> None:
    """Say what is wrong with this machine, and the fix for each.

    Driver, GPU and its memory, RAM, pinned memory, disk, directories and weights; 8-bit kernels and every
    attention are run.
    """
    found = examine(weights.expanduser(), model)
    _show(found, as_json=json)
    failures = [one for one in found if one.state == "fail"]
    for error in (DeviceError, WeightsError, OutputError):
        worst = next((one for one in failures if one.error is error), None)
        if worst is not None:
            of = f"{len(failures)} of {count(len(found), 'check')} failed"
            raise error(f"{of}, first {worst.name}: {worst.found}; {worst.fix[:1].lower()}{worst.fix[1:]}")


def examine(weights: Path, model: str | None) -> "list[Finding]":
    """Every finding, in the order of the table; RequestError for a model that nobody knows."""
    from entrypoint import checks, gpu_checks
    from entrypoint.findings import guarded
    from runtime.profiles import load_profile, manifest_of

    if model is not None:
        manifest_of(model, load_profile("auto"))
    scene = look_around(weights, model)
    rows = {
        "system": checks.check_place,
        "python": checks.check_python,
        "torch": checks.check_torch,
        "driver": gpu_checks.check_driver,
        "gpu": gpu_checks.check_gpus,
        "8-bit kernels": gpu_checks.check_kernels,
        "tuning": gpu_checks.check_tuning,
        "triton": checks.check_compiler,
        "memory": checks.check_memory,
        "pinned memory": checks.check_pinning,
        "shared memory": checks.check_shared_memory,
        "disk": checks.check_disk,
        "weights": checks.check_weights,
        "directories": checks.check_directories,
    }
    return [finding for name, check in rows.items() for finding in guarded(name, check, scene)]


def look_around(weights: Path, model: str | None) -> "Scene":
    """What the checks look at."""
    from entrypoint.findings import Scene
    from runtime.device import inventory, select_device
    from runtime.errors import FourstepError
    from runtime.memory.machine import look
    from runtime.profiles import load_profile

    stock = inventory()
    try:
        _, device = select_device("auto", load_profile("auto"))
    except FourstepError:  # its reason is a finding of its own
        device = "cpu"
    gpu = next((one for one in stock.gpus if device == f"cuda:{one.index}"), None)
    return Scene(stock, gpu, look(weights, gpu), weights, model)


def _show(found: "list[Finding]", *, as_json: bool) -> None:
    warnings, failures = (sum(one.state == state for one in found) for state in ("warn", "fail"))
    if as_json:
        for one in found:
            rest = {} if one.table is None else {"table": one.table.as_dicts()}
            emit("finding", name=one.name, state=one.state, found=one.found, fix=one.fix, **rest)
        emit("result", ok=not failures, warnings=warnings, failures=failures)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    rows: list[tuple[str, str, str]] = []
    for one in found:
        rows.append((one.state, one.name, one.found))
        if one.fix:
            rows.append(("", "", f"-> {one.fix}"))
    first, *lines = aligned(("", "CHECK", "FOUND"), rows, width=width)
    click.secho(first, bold=True)
    for line in lines:
        state = line.split(" ", 1)[0]
        coloured = click.style(state, fg=COLOURS[state], bold=True) if state in COLOURS else state
        click.echo(coloured + line[len(state) :])
    for table in (one.table for one in found if one.table is not None):
        click.echo()
        show_table(table, width)
    if not failures:
        tell(f"nothing fails, {count(warnings, 'warning')}" if warnings else "all is well")


def show_table(table: "Table", width: int | None) -> None:
    """On stdout; with `width` the last column is wrapped."""
    first, *lines = aligned(table.header, table.rows, right=table.right, width=width)
    click.secho(first, bold=True)
    for line in lines:
        click.echo(line)
