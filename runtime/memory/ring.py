"""The ring: a few hundred megabytes of pinned host memory, in chunks, through which all weights travel.

A copy from pinned memory to the GPU runs beside the computation at the speed of the bus; one from ordinary
memory is staged by the driver and holds up its thread. Pinned memory cannot be swapped or moved, and WSL2
and containers limit it, so it is small and used over and over: a reader fills a chunk, the copy to the GPU
empties it, and the next reader waits for the event of that copy.

Memory is mapped and then pinned by the driver (cuMemHostRegister) for three reasons: torch's own pinned
allocator rounds up to powers of two and never gives back; the driver's interface, unlike the runtime's,
leaves no error behind for torch to stumble over; and a read that hangs on a dead disk keeps valid memory
when all else is gone.
"""

import ctypes
import mmap
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.memory.source import PAGE, SLACK

MIN_CHUNK = SLACK + PAGE
MIN_PINNED = 2  # chunks; with one alone reading and copying could not overlap
PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every context of the process
_POLL = (0.0002, 0.002)  # seconds between looks at an event, at first and at most


class Event(Protocol):
    """What tells that a copy is done: torch.cuda.Event."""

    def query(self) -> bool:
        """Whether it has happened; never waits."""


class RingUser(Protocol):
    """A stream that fills chunks ahead of time."""

    def drop_ahead(self) -> None:
        """Give back the chunks that are filled and not yet on their way."""


class Chunk:
    """One piece of the ring: `space` for reading into, `bytes` (uint8, the same memory) for copying from."""

    def __init__(self, memory: mmap.mmap, begin: int, nbytes: int) -> None:
        self.space = memoryview(memory)[begin : begin + nbytes]
        self.bytes: Tensor = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=begin)
        self.busy: Event | None = None  # the copy that reads it


class Ring:
    """`chunks` chunks of `chunk_bytes` each (a multiple of 4096; `capacity` bytes of data fit in one).

    pinned: pin them for CUDA's copies. When the driver pins fewer than all, the ring is as short as that;
    when it pins fewer than two, all chunks are ordinary memory. `pinned` and `description` say what came of
    it. device: the GPU that the copies are for, the current one if none is named. `driver`: libcuda as it was
    used, None where nothing is pinned.
    """

    def __init__(
        self,
        chunk_bytes: int,
        chunks: int,
        pinned: bool,
        device: torch.device | str | None = None,
        driver: Any | None = None,
    ) -> None:
        if chunk_bytes % PAGE or chunk_bytes < MIN_CHUNK:
            raise ValueError(
                f"chunks of {chunk_bytes} bytes: expected a multiple of {PAGE}, {MIN_CHUNK} or more"
            )
        if chunks < 1:
            raise ValueError(f"{chunks} chunks: expected at least one")
        self.chunk_bytes = chunk_bytes
        self.pinned = False
        self.driver: Any | None = None
        # Shared, which is mmap's default: private pages are copied on a write while a child process starts,
        # and the GPU would go on reading the old ones.
        self._memory = mmap.mmap(-1, chunk_bytes * chunks)
        count, reason = chunks, ""
        if pinned:
            try:
                count, reason = self._pin(cuda_driver(device) if driver is None else driver, chunks)
            except OSError as error:
                reason = f"the CUDA driver library is not there ({error})"
        self.chunks = count
        kind = "pinned" if self.pinned else "not pinned" + (f": {reason}" if reason else "")
        self.description = f"{count} chunks of {chunk_bytes / 2**20:g} MiB, {kind}"
        self._free = deque(Chunk(self._memory, i * chunk_bytes, chunk_bytes) for i in range(count))
        self._changed = threading.Condition()
        self._user: weakref.ref[RingUser] | None = None
        self._closed = False

    @property
    def capacity(self) -> int:
        """Bytes of data that fit into a chunk, wherever in a page they begin."""
        return self.chunk_bytes - SLACK

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the ring takes."""
        return self.chunk_bytes * self.chunks

    def claim(self, user: RingUser) -> None:
        """Make `user` the one that reads ahead; the one before gives back what it holds filled.

        Without this, a stream that waits with full chunks for its next pass would starve the one that runs.
        """
        with self._changed:
            before = self._user() if self._user is not None else None
            self._user = weakref.ref(user)
        if before is not None and before is not user:
            before.drop_ahead()

    def acquire(self, stopped: Callable[[], bool]) -> Chunk | None:
        """A chunk that nobody reads any more; None as soon as `stopped()` says so (`wake` has it asked)."""
        with self._changed:
            while not self._free:
                if stopped():
                    return None
                if self._closed:
                    raise RuntimeError("the ring is closed, and weights are still to come through it")
                self._changed.wait()
            chunk = self._free.popleft()
        pause, longest = _POLL
        while chunk.busy is not None and not chunk.busy.query():
            if stopped():
                with self._changed:
                    self._free.appendleft(chunk)
                    self._changed.notify()
                return None
            # Polled, not waited for: a wait for an event cannot be called off, and copies can be seconds
            # away.
            time.sleep(pause)
            pause = min(2 * pause, longest)
        chunk.busy = None
        return chunk

    def release(self, chunk: Chunk, busy: Event | None = None) -> None:
        """Give a chunk back; `busy` is the event after the copy that still reads it."""
        with self._changed:
            chunk.busy = busy
            self._free.append(chunk)
            self._changed.notify()

    def wake(self) -> None:
        """Let every waiting `acquire` ask whether it is to stop."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for the copies out of it, unpin and let go of the memory; idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            chunks = list(self._free)
            self._free.clear()
            self._changed.notify_all()
        for chunk in chunks:
            while chunk.busy is not None and not chunk.busy.query():
                time.sleep(_POLL[1])
        if self.pinned:
            self._unpin()
            self.pinned = False

    def _pin(self, driver: Any, chunks: int) -> tuple[int, str]:
        """Pin chunk by chunk: (chunks to keep, why not all)."""
        address, reason = address_of(self._memory), ""
        count = 0
        while count < chunks:
            status = driver.cuMemHostRegister_v2(
                ctypes.c_void_p(address + count * self.chunk_bytes),
                ctypes.c_size_t(self.chunk_bytes),
                PORTABLE,
            )
            if status != 0:
                reason = (
                    f"the driver pins no more than {count * self.chunk_bytes / 2**20:g} MiB (error {status})"
                )
                break
            count += 1
        places = [address + i * self.chunk_bytes for i in range(count)]
        if count >= min(MIN_PINNED, chunks):
            self.pinned, self.driver = True, driver
            # Also when the ring is dropped without `close`. The mapping is held until then.
            self._unpin = weakref.finalize(self, unregister, driver, places, self._memory)
            return count, reason
        unregister(driver, places, self._memory)
        return chunks, reason


def cuda_driver(device: torch.device | str | None = None) -> Any:
    """libcuda, with torch's context of `device` current on the calling thread; OSError without a driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    named = torch.device(device) if device is not None else torch.device("cuda")
    if named.index is not None:
        torch.cuda.set_device(named)
    torch.cuda.synchronize()  # the driver's calls need a context; torch makes it at its first use
    return driver


def unregister(driver: Any, places: list[int], memory: mmap.mmap) -> None:
    """Unpin what begins at `places`, parts of `memory`, which is there until then."""
    for place in places:
        driver.cuMemHostUnregister(ctypes.c_void_p(place))


def address_of(memory: mmap.mmap) -> int:
    """Where a mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
