"""What a video says about its own making: versions, and a fingerprint of every file that took part."""

import hashlib
import platform
import time
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FULL_DIGEST_LIMIT = 64 << 20  # bytes; hashing 22 GB would take longer than the video
EDGE = 1 << 20  # bytes from each end of a larger file
SETTLED = 2 * 10**9  # ns after which another change of a file has another time, on every file system


def fingerprint(path: Path) -> str:
    """`sha256:...` of a file up to 64 MiB; of size, first and last MiB (`sha256-edges:...`) beyond that."""
    status = path.stat()
    told = _settled_fingerprint if time.time_ns() - status.st_ctime_ns > SETTLED else _fingerprint
    return told(path.absolute(), status.st_size, status.st_ctime_ns)


def _fingerprint(path: Path, size: int, _changed_ns: int) -> str:
    with path.open("rb") as file:
        if size <= FULL_DIGEST_LIMIT:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        digest.update(file.read(EDGE))
        file.seek(size - EDGE)
        digest.update(file.read(EDGE))
        return "sha256-edges:" + digest.hexdigest()


_settled_fingerprint = lru_cache(maxsize=256)(_fingerprint)  # a run asks several times for the same files


def fingerprints(paths: Iterable[Path]) -> dict[str, str]:
    """Fingerprint by file name with its directory, as in `distill_fp8/block_0.safetensors`."""
    return {f"{path.parent.name}/{path.name}": fingerprint(path) for path in paths}


def versions() -> dict[str, str]:
    """Versions that can change a video's pixels."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in ("fourstep", "av", "tokenizers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that was not installed
            found[package] = "not installed"
    return found
