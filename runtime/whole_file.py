"""A file that is there whole or not at all, whatever happens while it is written."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

KEPT_LENGTH = 40  # characters of the name, so that what is added never makes it too long for a file system


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file beside `path`; when the block ends, sync it to the disk and give it the name `path`.

    It replaces what is there; readers see the old content or the new. If anything is raised, the new file is
    removed and `path` left as it was. Creates the directory. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.partial")
    # A new file and no link that someone put there: the temporary directory belongs to everybody.
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        _sync_directory(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what writers of `path` left that were killed; only for a `path` that nobody is writing."""
    for part in path.parent.iterdir():
        if part.name.startswith(_prefix(path)) and part.name.endswith(".partial"):
            part.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return f".{path.name[:KEPT_LENGTH]}.{digest}."


def _sync_directory(directory: Path) -> None:
    """A rename is on the disk when its directory is; where that cannot be asked for, it comes with time."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
