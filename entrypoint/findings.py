"""What `t2v doctor` finds: one row each, with the fix in a sentence where something is not right."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.device import Gpu, Inventory
from runtime.errors import FourstepError
from runtime.memory.machine import Machine

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Table:
    """What a finding rests on, shown below all of them. right: columns that are flush right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()

    def as_dicts(self) -> list[dict[str, str]]:
        """For JSON: a row as header (lower case, spaces as _) -> cell."""
        names = [name.lower().replace(" ", "_") for name in self.header]
        return [dict(zip(names, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Finding:
    """One row. fix: what to do, in a sentence, "" for ok. error: what a failure of this kind is to a run."""

    name: str
    state: State
    found: str
    fix: str = ""
    error: type[FourstepError] | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Scene:
    """What the checks look at: the driver's word, the machine, and what the user asked about.

    gpu: the one that a run would take. model: a name of `t2v models`; None for whatever lies in `weights`.
    """

    stock: Inventory
    gpu: Gpu | None
    machine: Machine
    weights: Path
    model: str | None


Check = Callable[[Scene], Iterable[Finding]]


def ok(name: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(name, "ok", found)


def warn(name: str, found: str, fix: str) -> Finding:
    """A run may go well, more slowly or not at all; `fix` says how to make it good."""
    return Finding(name, "warn", found, fix)


def fail(name: str, found: str, fix: str, error: type[FourstepError]) -> Finding:
    """A run that needs this ends with `error`."""
    return Finding(name, "fail", found, fix, error)


def guarded(name: str, check: Check, scene: Scene) -> list[Finding]:
    """The findings of a check; one that breaks is a finding too, never a traceback."""
    try:
        return list(check(scene))
    except Exception as error:  # noqa: BLE001 - a broken machine breaks in ways that nobody has listed
        reason = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
        return [warn(name, f"could not be looked at ({what})", "This is a bug: please report this line.")]


def sentence(words: str) -> str:
    """`words` with a capital at its beginning and a stop at its end."""
    words = words.strip()
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", "!", "?")) else ".")


def split_advice(message: str) -> tuple[str, str]:
    """A message of the house, "what is wrong; what to do.", as (found, fix)."""
    for mark in ("; ", ": "):
        found, _, fix = message.rpartition(mark)
        if found:
            return found, sentence(fix)
    return message, ""


def exists_or_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def writable(path: Path) -> bool:
    """Whether files can be made in a directory that is there, or that would have to be made."""
    return os.access(exists_or_parent(path), os.W_OK | os.X_OK)
