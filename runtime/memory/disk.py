"""How fast the weights can be read: a short, spread-out read of the files themselves, past the page cache.

The files are read as the streaming reads them: large pieces, a few readers at once, O_DIRECT where the file
system has it. Otherwise the pieces are dropped from the page cache first and read as usual, and the kernel's
own count of bytes that came from a device (/proc/self/io) tells whether that worked.
"""

import mmap
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
IN_MEMORY = ("tmpfs", "ramfs", "rootfs")

SAMPLE_BYTES = 256 << 20
SAMPLE_SECONDS = 0.5
_LEAST_BYTES = 64 << 20  # less is over before the device is at speed
_PIECE = 4 << 20
_ALIGN = 4096  # of O_DIRECT: offset, length and address are multiples of a block of the device
_READERS = 4  # one alone leaves a fast device idle while it copies
_FILES = 16  # the largest ones
_ENTRIES = 5000  # looked at in a directory; beyond that it is no directory of weights
_PATIENCE = 2.0  # seconds past the end for a read that hangs

MOUNTS = Path("/proc/self/mountinfo")
IO = Path("/proc/self/io")


@dataclass(frozen=True)
class DiskSpeed:
    """speed: bytes/s of large reads, None if not known. source: how it was measured, or why it was not."""

    speed: float | None
    source: str


@dataclass
class _Sample:
    """What the readers share."""

    pieces: Iterator[tuple[Path, int]]
    deadline: float
    direct: bool
    guard: threading.Lock = field(default_factory=threading.Lock)
    bytes: int = 0
    last: float = 0.0
    error: str | None = None

    def next(self) -> tuple[Path, int] | None:
        """The next piece to read; None when time or pieces are out, or something failed."""
        with self.guard:
            if self.error is not None or time.perf_counter() >= self.deadline:
                return None
            return next(self.pieces, None)

    def count(self, nbytes: int) -> None:
        """So many bytes have arrived."""
        with self.guard:
            self.bytes += nbytes
            self.last = time.perf_counter()


def probe_disk(weights: Path, sample_bytes: int = SAMPLE_BYTES, seconds: float = SAMPLE_SECONDS) -> DiskSpeed:
    """The speed at which the weight files at `weights` (a directory or a file) are read; never raises.

    Reads at most `sample_bytes`, for about `seconds`; memory: 16 MiB.
    """
    files = largest_files(weights)
    total = sum(size for _, size in files)
    if not files:
        return DiskSpeed(None, f"not measured: no weight file in {weights}")
    if total < _LEAST_BYTES:
        return DiskSpeed(None, f"not measured: the files in {weights} are too small ({total / 1e6:.1f} MB)")
    kind = filesystem(files[0][0])
    pieces = list(_spread(files, sample_bytes))
    try:
        sample, seconds_taken, from_device = _measure(pieces, seconds, direct=_has_direct(files[0][0]))
    except OSError as error:
        return DiskSpeed(None, f"not measured: {files[0][0]} cannot be read ({error.strerror or error})")
    if sample.error is not None or not sample.bytes:
        return DiskSpeed(None, f"not measured: {sample.error or 'nothing arrived in time'}")
    how = f"read {sample.bytes / 1e6:.0f} MB of {kind or 'an unknown file system'}"
    if kind in IN_MEMORY:
        how += ", which is in memory"
    elif sample.direct:
        how += " past the page cache"
    elif from_device is None:
        how += "; how much of it was in the page cache is not known"
    elif from_device < sample.bytes // 2:
        how += f"; {100 - 100 * from_device // sample.bytes} % of it was in the page cache"
    return DiskSpeed(sample.bytes / seconds_taken, how)


def largest_files(weights: Path) -> list[tuple[Path, int]]:
    """The largest weight files at `weights` with their sizes, largest first; [] where there are none."""
    found = {}
    for path in _candidates(weights):
        try:
            if path.is_file():
                real = path.resolve()  # several models may link to one file
                found[real] = real.stat().st_size
        except OSError:
            continue  # it went away, or may not be looked at: then it is not a file to measure
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [(path, size) for path, size in ordered[:_FILES] if size]


def filesystem(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The type of the file system that holds `path` ("ext4", "tmpfs"); None where the kernel does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
        place = path.resolve()
    except OSError:
        return None
    best, kind = "", None
    for line in lines:
        head, _, tail = line.partition(" - ")
        if len(head.split()) < 5 or not tail.split():
            continue
        point = head.split()[4].replace("\\040", " ")
        # The last of equal mount points lies on top of the others.
        if len(point) >= len(best) and place.is_relative_to(point):
            best, kind = point, tail.split()[0]
    return kind


# ------------------------------------------------------------------------------------------------ measuring


def _candidates(weights: Path) -> Iterator[Path]:
    if weights.is_file():
        yield weights
        return
    seen = 0
    for directory, folders, names in os.walk(weights):
        depth = len(Path(directory).relative_to(weights).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < 3 else []
        for name in names:
            seen += 1
            if name.endswith(WEIGHT_SUFFIXES):
                yield Path(directory) / name
        if seen > _ENTRIES:
            return


def _spread(files: list[tuple[Path, int]], sample_bytes: int) -> Iterator[tuple[Path, int]]:
    """(file, offset) of whole pieces: a run from each file, from where chance says, the files in turn.

    Elsewhere each time, so that a cache below this machine (a host's, a server's) does not answer.
    """
    wanted = max(sample_bytes // len(files) // _PIECE, 1)
    runs = []
    for file, size in files:
        whole = size // _PIECE
        count = min(wanted, whole)
        first = random.randint(0, whole - count)
        runs.append([(file, (first + place) * _PIECE) for place in range(count)])
    left = sample_bytes // _PIECE
    for place in range(max(map(len, runs))):
        for run in runs:
            if place < len(run) and left > 0:
                left -= 1
                yield run[place]


def _has_direct(path: Path) -> bool:
    """Whether the file system reads past the page cache."""
    if not hasattr(os, "O_DIRECT"):
        return False
    buffer = mmap.mmap(-1, _ALIGN)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # EINVAL of tmpfs before Linux 6.6, and of many network file systems
        return False
    try:
        return os.preadv(fd, [buffer], 0) > 0
    except OSError:
        return False
    finally:
        os.close(fd)
        buffer.close()


def _measure(
    pieces: Iterable[tuple[Path, int]], seconds: float, *, direct: bool
) -> tuple[_Sample, float, int | None]:
    """Read for `seconds`: what arrived, the time it took, how much came from a device (None: not told)."""
    pieces = list(pieces)
    if not direct:
        for file, offset in pieces:
            _drop(file, offset)
    before = _read_bytes()
    begun = time.perf_counter()
    sample = _Sample(iter(pieces), begun + seconds, direct)
    # Daemons: a read of a dead server hangs for minutes, and must keep nobody from the answer or the end.
    readers = [threading.Thread(target=_read, args=(sample,), daemon=True) for _ in range(_READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(max(0.0, sample.deadline + _PATIENCE - time.perf_counter()))
    if sample.error is None and not sample.bytes and any(reader.is_alive() for reader in readers):
        sample.error = f"no piece of {_PIECE >> 20} MiB came within {seconds + _PATIENCE:.1f} s"
    after = _read_bytes()
    device = None if before is None or after is None else after - before
    return sample, max(sample.last - begun, 1e-6), device


def _read(sample: _Sample) -> None:
    """One reader: pieces until there are no more."""
    flags = os.O_RDONLY | (os.O_DIRECT if sample.direct else 0)
    with mmap.mmap(-1, _PIECE) as buffer:  # anonymous maps begin at a page, as O_DIRECT wants it
        while (piece := sample.next()) is not None:
            file, offset = piece
            try:
                fd = os.open(file, flags)
                try:
                    sample.count(os.preadv(fd, [buffer], offset))
                finally:
                    os.close(fd)
            except OSError as error:
                sample.error = f"{file} cannot be read ({error.strerror or error})"


def _drop(file: Path, offset: int) -> None:
    """Have the kernel forget a piece that it has cached."""
    if not hasattr(os, "posix_fadvise"):
        return
    fd = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, offset, _PIECE, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _read_bytes() -> int | None:
    """Bytes that this process has caused to be read from devices; None where the kernel does not tell."""
    try:
        lines = IO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("read_bytes:")]
    return int(found[0]) if found else None
