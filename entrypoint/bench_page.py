"""How a bench is shown: the machine at the head, a table for each model and size, the card, and JSON."""

import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from entrypoint.bench_runs import PHASES
from entrypoint.table import aligned
from runtime.bench.gauge import Summary
from runtime.bench.samples import Row, Unit
from runtime.bench.targets import Verdict, judge
from runtime.errors import OutputCheckError, OutputError
from runtime.whole_file import whole_file

FORMAT = 1
"""Of the JSON object; one more for each change that a reader would trip over."""
STDOUT = Path("-")
_DASH = "-"


@dataclass(frozen=True)
class Gauged:
    """The card during one part of one model and size."""

    model: str
    size: str
    part: str
    seconds: float
    card: Summary | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shown = {"model": self.model, "size": self.size, "part": self.part, "seconds": round(self.seconds, 3)}
        return shown | {"card": None if self.card is None else self.card.as_dict()}


@dataclass
class Report:
    """All that was found so far, and where it goes.

    card: its name, which targets are looked up by. path: of the JSON, `-` for stdout, None for none.
    """

    machine: Mapping[str, str]
    card: str
    settings: Mapping[str, Any]
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    gauged: list[Gauged] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    trouble: str = ""  # why the card cannot be watched
    failed: str | None = None
    began: float = field(default_factory=time.time)
    _told: int = 0  # rows that are on the screen

    def as_dict(self) -> dict[str, Any]:
        """The JSON object; every row has its verdict."""
        return {
            "event": "bench",
            "format": FORMAT,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "rows": [self._row(row) for row in self.rows],
            "card": [one.as_dict() for one in self.gauged],
            "card_trouble": self.trouble,
            "left_out": self.left_out,
            "failed": self.failed,
        }

    def _row(self, row: Row) -> dict[str, Any]:
        verdict = judge(row, self.card)
        return row.as_dict() | ({} if verdict is None else {"goal": verdict.as_dict()})

    def keep(self) -> None:
        """Write the JSON, if it goes to a file: what was found outlives what comes. OutputError."""
        if self.path is None or self.path == STDOUT:
            return
        try:
            with whole_file(self.path) as file:
                file.write((json.dumps(self.as_dict(), indent=1) + "\n").encode())
        except OSError as error:
            raise OutputError(
                f"The report {self.path} cannot be written ({error.strerror}); name another file with --json."
            ) from error

    def show_rows(self) -> None:
        """Print what was found since the last time; the machine before the first of it."""
        new = self.rows[self._told :]
        if new:
            self._print([] if self._told else _facts(self.machine), self._tables(new, self._width))
            self._told = len(self.rows)

    def show(self) -> None:
        """Print what was not printed yet, the card and what was left out; JSON where it goes to stdout."""
        self.show_rows()
        self._print(self._end())
        if self.path == STDOUT and (self.rows or self.left_out):
            click.echo(json.dumps(self.as_dict()))

    @property
    def _width(self) -> int | None:
        screen = sys.stderr if self.path == STDOUT else sys.stdout
        return shutil.get_terminal_size().columns if screen.isatty() else None

    def _print(self, *parts: list[str]) -> None:
        for line in (line for part in parts for line in part):
            click.echo(line, err=self.path == STDOUT)

    def check(self) -> None:
        """OutputCheckError if a check found that it is not right."""
        wrong = [row for row in self.rows if row.right is False]
        if wrong:
            one = wrong[0]
            raise OutputCheckError(
                f"{len(wrong)} of {sum(row.right is not None for row in self.rows)} checks failed, first "
                f"{one.model} {one.size} {one.what}: {one.note}; the same seed must give the same frames."
            )

    # --- for people ---

    def lines(self, width: int | None = None) -> list[str]:
        """The page, `width` characters wide; None: as wide as its lines are."""
        return [*_facts(self.machine), *self._tables(self.rows, width), *self._end()]

    def _end(self) -> list[str]:
        """The card, and what was left out."""
        cards = ["", *self._cards()] if self.gauged else []
        return cards + [f"left out: {what}" for what in self.left_out]

    def _tables(self, rows: Sequence[Row], width: int | None) -> list[str]:
        """For each model and size the table of its rows."""
        shown: list[str] = []
        for model, size in dict.fromkeys((row.model, row.size) for row in rows):
            mine = [row for row in rows if (row.model, row.size) == (model, size)]
            shown += ["", " ".join(filter(None, (model, size)))]
            single = [row for row in mine if not row.phase]
            shown += self._singles(single, width) if single else []
            shown += ([""] if single else []) + self._runs(mine) if len(single) < len(mine) else []
        return shown

    def _singles(self, rows: Sequence[Row], width: int | None) -> list[str]:
        cells = []
        for row in rows:
            numbers = [_DASH] * 3
            if row.found is not None:
                three = (row.found.median, row.found.least, row.found.most)
                numbers = [value_of(number, row.unit) for number in three]
            reference = "" if row.reference is None else value_of(row.reference.median, row.unit)
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
            goal = goal_of(row, judge(row, self.card))
            cells.append([row.part, row.what, *numbers, reference, ratio, goal, row.note])
        header = ["PART", "WHAT", "MEDIAN", "LEAST", "MOST", "REFERENCE", "RATIO", "GOAL", "NOTE"]
        return aligned(header, cells, right=range(2, 7), width=width)

    def _runs(self, rows: Iterable[Row]) -> list[str]:
        """One line for each kind of run, its phases in columns."""
        kinds: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row.phase:
                kinds.setdefault(row.what, {})[row.phase] = row
        cells = []
        for kind, phases in kinds.items():
            line = [f"run {kind}"]
            for phase in PHASES:
                found = phases[phase].found if phase in phases else None
                line.append("" if found is None else value_of(found.median, "s"))
            total = phases["total"]
            assert total.found is not None  # of a run that was made
            line += [value_of(total.found.least, "s"), value_of(total.found.most, "s")]
            goals = {phase: goal_of(row, judge(row, self.card)) for phase, row in phases.items()}
            line.append("; ".join(f"{phase} {goal}" for phase, goal in goals.items() if goal))
            cells.append([*line, total.note])
        header = ["PART", *(phase.upper() for phase in PHASES), "LEAST", "MOST", "GOAL", "NOTE"]
        return aligned(header, cells, right=range(1, len(PHASES) + 3))

    def _cards(self) -> list[str]:
        """The card in each part: median / least of clocks, power and temperature."""
        if all(one.card is None for one in self.gauged):
            return [f"The card was not watched: {self.trouble}."] if self.trouble else []
        cells = []
        for one in self.gauged:
            card = one.card
            if card is None:
                cells.append([one.model, one.size, one.part, f"{one.seconds:.1f} s", *[_DASH] * 4, ""])
                continue
            pairs = (card.sm, card.memory, card.watts, card.celsius)
            reasons = ", ".join(f"{name} {share:.0%}" for name, share in card.reasons.items())
            numbers = [f"{median:.0f} / {least:.0f}" for median, least in pairs]
            cells.append(
                [one.model, one.size, one.part, f"{one.seconds:.1f} s", *numbers, reasons or "nothing"]
            )
        header = ["MODEL", "SIZE", "PART", "TOOK", "SM MHz", "MEMORY MHz", "W", "°C", "HELD BACK BY"]
        return ["The card, median / least", *aligned(header, cells, right=range(3, 8))]


def value_of(number: float, unit: Unit) -> str:
    """A value with its unit: `2.441 s`, `18.20 ms`, `1301 TFLOP/s`, `55.1 GB/s`, `1.07`."""
    if unit == "s":
        return f"{number:.3f} s" if abs(number) >= 1 else f"{number * 1e3:.2f} ms"
    if unit == "FLOP/s":
        return f"{number / 1e12:.0f} TFLOP/s" if number >= 1e13 else f"{number / 1e9:.1f} GFLOP/s"
    return f"{number / 1e9:.1f} GB/s" if unit == "B/s" else f"{number:.2f}"


def goal_of(row: Row, verdict: Verdict | None) -> str:
    """What is said of a goal: reached, missed and by how much, none for this card; "" where there is none."""
    if row.right is not None:
        return "passed" if row.right else "FAILED"
    if verdict is None:
        return ""
    if verdict.most is None or row.found is None:
        return "no target for this card"
    goal = f"<= {value_of(verdict.most, row.unit)}"
    if verdict.reached:
        return f"{goal} reached"
    return f"{goal} missed, {row.found.median / verdict.most - 1:.0%} above"


def _facts(machine: Mapping[str, str]) -> list[str]:
    widest = max(map(len, machine), default=0)
    return [f"{name.ljust(widest)}  {value}" for name, value in machine.items()]
