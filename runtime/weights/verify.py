"""Whether files are what they should be: sizes and headers at once, or every byte against its digest.

Headers: the table of a safetensors file, which must cover it to the last byte; the directory of a .pth, which
is a zip; the whole of a .json. No pickle is opened.
"""

import hashlib
import json
import os
import threading
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import WeightsError
from runtime.schema import ModelManifest
from runtime.weights.state import pinned_of, read_record, size_of, wanted_files, write_record

ZIPPED = (".pth", ".pt", ".ckpt", ".bin")
_CHUNK_BYTES = 4 << 20
_MAX_JSON_BYTES = 256 << 20
OnBytes = Callable[[int], None]
Task = tuple[str, Path, int | None, str | None]  # target, where, bytes and digest if known


@dataclass(frozen=True)
class FileCheck:
    """The verdict on one file. `sha256`: what its bytes gave (with `full`); `reason`: what is wrong."""

    target: str
    path: Path
    state: Literal["ok", "missing", "wrong"]
    bytes: int | None
    reason: str = ""
    sha256: str | None = None
    pinned: bool = False  # whether there was a digest to hold it against


def verify(
    manifest: ModelManifest,
    directory: Path,
    *,
    full: bool = False,
    workers: int | None = None,
    on_bytes: OnBytes = lambda count: None,
) -> list[FileCheck]:
    """Check every file of a model in `directory` (embedded ones: where they ship), in the manifest's order.

    Optional files count only where they were downloaded. With `full` every byte is read, several files at a
    time, and held against the noted or stated digest where there is one. Raises WeightsError only for notes
    that cannot be read.
    """
    embedded = manifest.embedded_directory()
    if embedded is not None:
        names = sorted(_shipped(manifest, embedded))
        tasks: list[Task] = [(name, embedded / name, None, None) for name in names]
    else:
        tasks = _expected(manifest, directory)

    def check(task: Task) -> FileCheck:
        return _check(*task, full=full, on_bytes=on_bytes)

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(check, tasks))


def note_damage(manifest: ModelManifest, directory: Path, checks: Sequence[FileCheck]) -> bool:
    """Note which downloaded files were found wrong, so that `pull` replaces them; False if some cannot be.

    What was not downloaded by `pull` is never noted, so never replaced.
    """
    if manifest.embedded is not None:
        return False
    record = read_record(directory, manifest.name)
    wrong = {check.target for check in checks if check.state == "wrong"}
    damaged = sorted(wrong & record.files.keys())
    try:
        if damaged != record.damaged:
            record.damaged = damaged
            write_record(directory, record)
    except OSError:  # weights are often mounted read-only
        return False
    return wrong == set(damaged)


def _expected(manifest: ModelManifest, directory: Path) -> list[Task]:
    record = read_record(directory, manifest.name)
    tasks: list[Task] = []
    for file in wanted_files(manifest):
        pinned = pinned_of(file, record)
        if file.optional and pinned is None:
            continue
        nbytes = file.bytes if pinned is None else pinned.bytes
        digest = file.sha256 if pinned is None else pinned.sha256
        tasks.append((file.target, directory / file.target, nbytes, digest))
    return tasks


def _shipped(manifest: ModelManifest, root: Path) -> set[str]:
    """The files of an embedded model: all of its variant's directories, and the parts beside them."""
    places = [root / name for name in manifest.subdirectories]
    found = {path for place in places for path in place.rglob("*") if path.is_file()}
    files = manifest.files
    names = {*files.transformer, *files.text_encoder, *files.vae, *files.tokenizer}
    found |= {root / name for name in names if ".." not in name and (root / name).is_file()}
    return {path.relative_to(root).as_posix() for path in found}


def _check(
    target: str, path: Path, nbytes: int | None, digest: str | None, *, full: bool, on_bytes: OnBytes
) -> FileCheck:
    size = size_of(path)
    if size is None:
        return FileCheck(target, path, "missing", None)
    try:
        if nbytes is not None and size != nbytes:
            raise WeightsError(f"is {size} bytes long, expected {nbytes}")
        check_header(path, target)
        found = sha256_of(path, on_bytes) if full else None
        if found is not None and digest is not None and found != digest:
            raise WeightsError(f"has sha256 {found}, expected {digest}")
    except WeightsError as error:
        reason = str(error).removeprefix(str(path)).lstrip(": ")
        return FileCheck(target, path, "wrong", size, reason, pinned=digest is not None)
    except OSError as error:
        return FileCheck(target, path, "wrong", size, f"cannot be read ({error.strerror})")
    return FileCheck(target, path, "ok", size, "", found, digest is not None)


def check_header(path: Path, name: str) -> None:
    """Prove the structure of a weight file by the ending of `name` (`path` may still have another one).

    Raises WeightsError that begins with the path. Other kinds of files pass.
    """
    suffix = Path(name).suffix
    if suffix == ".safetensors":
        from runtime.checkpoint.files import read_header  # torch: a second that an unread file need not cost

        read_header(path)
    elif suffix in ZIPPED:
        _check_zip(path)
    elif suffix == ".json":
        _check_json(path)


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:  # reads the directory at the end: a cut file has none
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(
            f"{path} is truncated, corrupt or not a torch file ({error}); download it again"
        ) from error
    if not any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        raise WeightsError(f"{path} is a zip without a torch pickle in it; download it again")


def _check_json(path: Path) -> None:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise WeightsError(f"{path} is too large for a JSON file; download it again")
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error}); download it again") from error


def sha256_of(path: Path, on_bytes: OnBytes = lambda count: None, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file in hexadecimal; leaves early, with a digest of less, once `stop` is set."""
    digest = hashlib.sha256()
    _feed(digest.update, path, on_bytes, stop)
    return digest.hexdigest()


def git_id_of(path: Path) -> str:
    """The id that git gives a file's content: SHA-1 of its length and its bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    _feed(digest.update, path, lambda count: None, None)
    return digest.hexdigest()


def _feed(
    update: Callable[[bytes], None], path: Path, on_bytes: OnBytes, stop: threading.Event | None
) -> None:
    with path.open("rb", buffering=0) as file:
        while (chunk := file.read(_CHUNK_BYTES)) and not (stop is not None and stop.is_set()):
            update(chunk)  # without the interpreter's lock, so several files go at once
            on_bytes(len(chunk))
