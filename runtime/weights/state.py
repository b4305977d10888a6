"""What a model's files should be, and what a weights directory notes of those that were verified there.

    DIR/.t2v/<model>.json              size, sha256 and origin of each file, since its first verified download
    DIR/.t2v/incoming/<model>/...part  what a download has so far; on the same file system, so that moving is
                                       a rename
    DIR/.t2v/lock                      held by whoever downloads into DIR

The notes are written beside their name and renamed, so they are whole whenever they are read.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import WeightsError
from runtime.schema import ModelManifest, PublishedPath

NOTES = ".t2v"
LOCK_POLL_SECONDS = 0.2
_MAX_NOTES_BYTES = 8 << 20


@dataclass(frozen=True)
class WantedFile:
    """One file of a model: where it is published, where it belongs, and what the manifest knows of it."""

    repository: str
    revision: str | None
    path: str  # in the repository
    target: str  # relative to the weights directory
    about_bytes: int  # 0 where the manifest names no size
    bytes: int | None
    sha256: str | None
    optional: bool
    primary: bool  # of the transformer's repository, which --revision is about


def wanted_files(manifest: ModelManifest) -> list[WantedFile]:
    """The files of a manifest in its order; empty for weights that ship with the program."""
    return [
        WantedFile(
            source.repository,
            source.revision,
            file.path,
            file.target,
            file.about_bytes,
            file.bytes,
            file.sha256,
            file.optional,
            primary=source is manifest.source,
        )
        for source in manifest.sources()
        for file in source.files
    ]


# ----------------------------------------------------------------------------------------------------- notes


class Pinned(BaseModel):
    """A file as it was when it was verified; `commit` is the revision that it came from."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    repository: str
    commit: str


class Record(BaseModel):
    """The notes on one model, by target.

    files: verified. absent: optional, and its repository has none. damaged: verified once, and found changed.
    """

    model_config = ConfigDict(extra="ignore", strict=True)
    model: str
    files: dict[PublishedPath, Pinned] = {}
    absent: list[str] = []
    damaged: list[str] = []

    def commit_of(self, repository: str) -> str | None:
        """The revision that files of `repository` came from, if any did."""
        commits = [pinned.commit for pinned in self.files.values() if pinned.repository == repository]
        return commits[-1] if commits else None


def record_path(directory: Path, model: str) -> Path:
    """Where the notes on `model` lie."""
    return directory / NOTES / f"{model}.json"


def read_record(directory: Path, model: str) -> Record:
    """The notes on `model`, empty where there are none; WeightsError where they cannot be read."""
    path = record_path(directory, model)
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_NOTES_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return Record(model=model)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); correct its permissions.") from error
    try:
        if len(text) > _MAX_NOTES_BYTES:
            raise ValueError("too long")
        return Record.model_validate_json(text)
    except (ValidationError, ValueError) as error:
        raise WeightsError(
            f"{path} does not hold the notes of a download; remove it, and `t2v weights pull --model {model} "
            f"--weights {directory}` checks the files and writes it anew."
        ) from error


def write_record(directory: Path, record: Record) -> None:
    """Write the notes whole, or leave the old ones."""
    path = record_path(directory, record.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True)
    with part.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def pinned_of(file: WantedFile, record: Record) -> Pinned | None:
    """What is noted of `file`, unless the manifest has come to say otherwise."""
    pinned = record.files.get(file.target)
    if pinned is None or (file.sha256 is not None and file.sha256 != pinned.sha256):
        return None
    return pinned


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where there is no file."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def is_complete(files: list[WantedFile], record: Record, directory: Path) -> bool:
    """Whether every file was verified before and still has its size; reads no file, asks no one."""
    for file in files:
        pinned = pinned_of(file, record)
        if pinned is None:
            if not (file.optional and file.target in record.absent):
                return False
        elif file.target in record.damaged or size_of(directory / file.target) != pinned.bytes:
            return False
    return bool(files)


# ------------------------------------------------------------------------------------------------------ lock


@contextmanager
def locked(directory: Path, model: str, notice: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `directory`; waits for whoever has it, and says so once.

    Waiting is what two containers want that start together: the second then finds the files there. The kernel
    drops the lock with its process, however that ends.
    """
    path = directory / NOTES / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        told = False
        while not _try_lock(file, path):
            if not told:
                notice(f"{_holder(file)} is downloading into {directory}; waiting until it ends.")
                told = True
            time.sleep(LOCK_POLL_SECONDS)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({model})")
        file.flush()
        yield


def _try_lock(file: IO[str], path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be locked ({error.strerror}); use a file system that can lock files."
        ) from error
    return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip() or "Another process"
