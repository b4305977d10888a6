"""Weights read from their files by offset, again and again, without filling the page cache.

A cgroup counts the page cache as memory of the process, so reading 14 GB a step through it would look like
a leak and push other programs out. Each read therefore takes what the page cache holds already
(`RWF_NOWAIT`), and the rest past it: by O_DIRECT where the filesystem has it, else buffered with the pages
dropped right after.

O_DIRECT wants file offset, address and length in multiples of a page. So a caller gives `space`, page-
aligned memory that is two pages longer than the data, and the data comes to lie at `offset % PAGE` in it:
then file and memory are aligned alike, and the pages around the data can be read in place, without a copy.
"""

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import WeightsError

PAGE = 4096
SLICE = 8 * 2**20  # bytes of one read call: long enough for any disk, short enough to be told to stop
SLACK = 2 * PAGE  # how much longer than the data the space of a read must be

_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class ReadStopped(Exception):
    """The reader was told to stop before its read was done; raised out of `WeightFiles.read`."""


class System:
    """The system calls that reading takes; tests put slow and failing ones in their place."""

    def open(self, path: Path, direct: bool) -> int:
        """A descriptor for reading, past the page cache if `direct`; OSError where that is impossible."""
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        if direct:
            if not hasattr(os, "O_DIRECT"):
                raise OSError(errno.EINVAL, "O_DIRECT is not known here")
            flags |= os.O_DIRECT
        return os.open(path, flags)

    def close(self, fd: int) -> None:
        """Give the descriptor back."""
        os.close(fd)

    def status(self, fd: int) -> tuple[int, int]:
        """(size in bytes, time of the last change in ns) of an open file."""
        status = os.fstat(fd)
        return status.st_size, status.st_mtime_ns

    def read(self, fd: int, target: memoryview, offset: int) -> int:
        """Bytes read into `target` from `offset` on; maybe fewer than asked, 0 at the end of the file."""
        return os.preadv(fd, [target], offset)

    def read_cached(self, fd: int, target: memoryview, offset: int) -> int:
        """The same from the page cache alone: BlockingIOError when it holds nothing there."""
        flag = getattr(os, "RWF_NOWAIT", None)
        if flag is None:
            raise OSError(errno.EOPNOTSUPP, "RWF_NOWAIT is not known here")
        return os.preadv(fd, [target], offset, flag)

    def expect_random(self, fd: int) -> None:
        """No readahead: a miss of `read_cached` would start one of megabytes otherwise."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def drop(self, fd: int, offset: int, nbytes: int) -> None:
        """Let the page cache forget this range."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


@dataclass
class _Opened:
    """One file: its descriptors, what they can do, and what it looked like when it was opened."""

    path: Path
    fd: int
    direct: int | None
    status: tuple[int, int]
    cached_reads: bool = True


@dataclass(frozen=True)
class ReadCounts:
    """What has been read so far. `disk_seconds` is time in which at least one disk read was under way."""

    cached_bytes: int = 0  # that the page cache held
    disk_bytes: int = 0
    disk_seconds: float = 0.0

    @property
    def disk_speed(self) -> float | None:
        """Bytes a second from the disk; None before anything was read from it."""
        return self.disk_bytes / self.disk_seconds if self.disk_seconds > 0 else None


class WeightFiles:
    """Files of weights, opened once each and read by offset from any number of threads.

    An open file survives being removed or replaced by another; one that is cut or written over is an error.
    """

    def __init__(self, system: System | None = None) -> None:
        self._system = system or System()
        self._files: dict[Path, _Opened] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._cached_bytes = self._disk_bytes = 0
        self._disk_seconds, self._disk_reads, self._disk_since = 0.0, 0, 0.0

    def open(self, file: Path) -> None:
        """Open `file` now, so that later it may be removed. Raises WeightsError when it cannot be."""
        self._opened(file, "its first tensor")

    def uses_page_cache(self, file: Path) -> bool:
        """Whether what is not cached must be read through the page cache, for want of O_DIRECT."""
        return self._opened(file, "its first tensor").direct is None

    @property
    def counts(self) -> ReadCounts:
        """Bytes and seconds up to now."""
        with self._lock:
            running = time.perf_counter() - self._disk_since if self._disk_reads else 0.0
            return ReadCounts(self._cached_bytes, self._disk_bytes, self._disk_seconds + running)

    def read(
        self,
        file: Path,
        offset: int,
        nbytes: int,
        space: memoryview,
        what: str,
        stopped: Callable[[], bool] = lambda: False,
    ) -> memoryview:
        """Bytes [offset, offset + nbytes) of `file`: the part of `space` in which they lie now.

        space: writable bytes, nbytes + SLACK at least, page-aligned (else the page cache is used). what: the
        tensor, for messages. stopped: asked between slices; ReadStopped is raised when it says True. Raises
        WeightsError when the file is gone, ends too early, changes while it is read, or cannot be read.
        """
        if len(space) < nbytes + SLACK:
            raise ValueError(f"{nbytes} bytes need a space of {nbytes + SLACK}, it has {len(space)}")
        opened = self._opened(file, what)
        begin = offset % PAGE
        done, cached = 0, True
        try:
            while done < nbytes:
                if stopped():
                    raise ReadStopped
                part = space[begin + done : begin + min(done + SLICE, nbytes)]
                missing = offset + done
                count = self._from_cache(opened, part, missing) if cached else 0
                if count < len(part):
                    cached = False  # one miss, and the rest of this read is not looked for
                    count += self._from_disk(
                        opened, space, begin + done + count, missing + count, len(part) - count
                    )
                if count == 0:
                    raise WeightsError(
                        f"{file} ends inside tensor {what}: it was cut while its weights were in use; "
                        "download it again"
                    )
                done += count
            status = self._system.status(opened.fd)
        except OSError as error:
            raise _unreadable(file, what, error) from error
        if status != opened.status:
            raise _changed(file, what)
        return space[begin : begin + nbytes]

    def read_rows(
        self, file: Path, offsets: Sequence[int], into: memoryview, space: memoryview, what: str
    ) -> None:
        """Short reads of equal length, from each of `offsets` on, one behind the other in `into` (bytes).

        What the page cache holds whole comes with one call of the system each; the rest as by `read`, through
        `space`, which is SLACK longer. Raises as `read`.
        """
        opened, nbytes = self._opened(file, what), len(into) // max(len(offsets), 1)
        parts = [into[place * nbytes : (place + 1) * nbytes] for place in range(len(offsets))]
        missing: list[int] = []
        try:
            for place, offset in enumerate(offsets):
                if not opened.cached_reads or self._cached_row(opened, parts[place], offset) < nbytes:
                    missing.append(place)
            if self._system.status(opened.fd) != opened.status:
                raise _changed(file, what)
        except OSError as error:
            raise _unreadable(file, what, error) from error
        with self._lock:
            self._cached_bytes += (len(parts) - len(missing)) * nbytes
        for place in missing:
            parts[place][:] = self.read(file, offsets[place], nbytes, space, what)

    def _cached_row(self, opened: _Opened, part: memoryview, offset: int) -> int:
        """How much of a row the page cache gave at once."""
        try:
            return self._system.read_cached(opened.fd, part, offset)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            opened.cached_reads = False
            return 0

    def close(self) -> None:
        """Close all files; idempotent. No read may be under way."""
        with self._lock:
            files, self._files, self._closed = list(self._files.values()), {}, True
        for opened in files:
            for fd in (opened.fd, opened.direct):
                if fd is not None:
                    self._system.close(fd)

    def __del__(self) -> None:
        if not self._closed:
            with suppress(OSError):  # nothing can be told from here
                self.close()

    def _opened(self, file: Path, what: str) -> _Opened:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{file} is read after its weights were closed")
            found = self._files.get(file)
            if found is None:
                try:
                    found = self._open(file)
                except OSError as error:
                    raise _unreadable(file, what, error) from error
                self._files[file] = found
            return found

    def _open(self, file: Path) -> _Opened:
        fd = self._system.open(file, direct=False)
        try:
            status = self._system.status(fd)
            with suppress(OSError):  # advice only
                self._system.expect_random(fd)
        except OSError:
            self._system.close(fd)
            raise
        try:
            direct = self._system.open(file, direct=True)
        except OSError:
            direct = None  # the filesystem has none: the page cache is used, and cleaned
        return _Opened(file, fd, direct, status)

    def _from_cache(self, opened: _Opened, part: memoryview, offset: int) -> int:
        """How many bytes of `part`, from its start, the page cache gave."""
        count = 0
        # The first page alone: asking for all of a part that is not there would make the kernel fetch it.
        for end in (min(PAGE, len(part)), len(part)):
            while opened.cached_reads and count < end:
                try:
                    got = self._system.read_cached(opened.fd, part[count:end], offset + count)
                except BlockingIOError:
                    got = 0
                except OSError as error:
                    if error.errno not in _NOT_SUPPORTED:
                        raise
                    opened.cached_reads, got = False, 0
                if got <= 0:
                    with self._lock:
                        self._cached_bytes += count
                    return count
                count += got
        with self._lock:
            self._cached_bytes += count
        return count

    def _from_disk(self, opened: _Opened, space: memoryview, at: int, offset: int, nbytes: int) -> int:
        """How many of nbytes from `offset` came into space[at:]; 0 at the end of the file."""
        self._disk_begins()
        count = 0
        try:
            if opened.direct is not None and _address(space) % PAGE == 0:
                count = self._direct(opened, space, at, offset, nbytes)
            else:
                count = self._system.read(opened.fd, space[at : at + nbytes], offset)
            with suppress(OSError):  # what the look into the cache, or a buffered read, left there
                first = offset // PAGE * PAGE  # the kernel drops whole pages only
                self._system.drop(opened.fd, first, max(-(-(offset + count) // PAGE) * PAGE - first, PAGE))
        finally:
            self._disk_ends(count)
        return count

    def _direct(self, opened: _Opened, space: memoryview, at: int, offset: int, nbytes: int) -> int:
        """The same through O_DIRECT, the pages around the range included."""
        before = offset % PAGE  # which is also at % PAGE
        length = -(-(before + nbytes) // PAGE) * PAGE
        assert opened.direct is not None
        try:
            got = self._system.read(opened.direct, space[at - before : at - before + length], offset - before)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            # Opened, and yet refused: a filesystem that forwards to one without O_DIRECT.
            return self._system.read(opened.fd, space[at : at + nbytes], offset)
        return max(0, min(got - before, nbytes))

    def _disk_begins(self) -> None:
        with self._lock:
            if self._disk_reads == 0:
                self._disk_since = time.perf_counter()
            self._disk_reads += 1

    def _disk_ends(self, nbytes: int) -> None:
        with self._lock:
            self._disk_bytes += nbytes
            self._disk_reads -= 1
            if self._disk_reads == 0:
                self._disk_seconds += time.perf_counter() - self._disk_since


def _address(space: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(space))


def _changed(file: Path, what: str) -> WeightsError:
    return WeightsError(
        f"{file} changed while tensor {what} was read from it; leave the weights alone until the "
        "video is done, verify them, and run again"
    )


def _unreadable(file: Path, what: str, error: OSError) -> WeightsError:
    """One sentence for what the operating system said."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return WeightsError(
            f"{file} is gone, and tensor {what} must be read from it; put the weights back and run again"
        )
    reason = error.strerror or str(error)
    advice = "check the disk and its connection, and run again"
    if error.errno == errno.ESTALE:
        advice = "the network filesystem lost it: mount it again, and run again"
    return WeightsError(f"{file} cannot be read at tensor {what}: {reason}; {advice}")
