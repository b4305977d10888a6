"""Blocks that stay in RAM: ordinary memory that fills while they are read first, and can be pinned in place.

From ordinary memory a block takes the way of one from the disk: a reader copies it, piece by piece, into the
pinned ring. On a fast bus that copy is the slowest part. What is pinned where it lies needs neither: the GPU
fetches it from there. Pinning is a favour of the driver, asked for in the background; what it refuses stays
ordinary memory.
"""

import ctypes
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import first_sentence
from runtime.memory.lane import Lane
from runtime.memory.ring import PORTABLE, address_of, unregister
from runtime.memory.source import PAGE

PART = 64 * 2**20
"""Bytes that are pinned by one call of the driver, which holds a lock that launches of kernels want, too."""

JOIN_SECONDS = 0.5  # how long `stop` waits for the call of the driver that is under way

_ADVICE = ("MADV_HUGEPAGE", "MADV_DONTFORK")


class CachedBlock:
    """The buffer of one block in RAM; pieces come in at the first pass and stay.

    nbytes: of the buffer; payload: the bytes in it that pieces bring, all but what aligns the matrices.
    """

    def __init__(self, nbytes: int, payload: int) -> None:
        # Mapped: the pages come one by one as they are written, and all go back to the system at the end.
        # Private, because large pages are for private memory alone; they make pinning cheaper, too. A child
        # process would share private pages until one side writes, and then one of them gets new ones: the
        # GPU could go on reading those that are no longer ours, and pages that are pinned are copied for
        # the child at once. No child needs this memory, so none is given it.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._mapped = mmap.mmap(-1, -(-max(nbytes, 1) // PAGE) * PAGE, private)
        for name in _ADVICE:
            with suppress(AttributeError, OSError):  # a kernel, or a system, that does not have it
                self._mapped.madvise(getattr(mmap, name))
        self._memory = np.frombuffer(self._mapped, dtype=np.uint8, count=nbytes)
        self._bytes = torch.frombuffer(self._mapped, dtype=torch.uint8, count=nbytes) if nbytes else None
        self._have: set[int] = set()
        self._missing = payload
        self._lock = threading.Lock()
        self._released = False
        self._unpin: Callable[[], object] | None = None
        self.pinned = False  # all of it, for copies from where it lies

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when it is full."""
        return self._memory.nbytes

    @property
    def complete(self) -> bool:
        """Whether every piece has come in."""
        return self._missing == 0

    def put(self, begin: int, data: np.ndarray) -> None:
        """Keep the bytes (n,) of the piece that begins at `begin`."""
        # numpy copies without the interpreter's lock and, unlike torch, without a pool of threads for each
        # caller
        np.copyto(self._memory[begin : begin + data.nbytes], data)
        with self._lock:
            if begin not in self._have:  # two readers may have had it, before and after a failure
                self._have.add(begin)
                self._missing -= data.nbytes

    def get(self, begin: int, into: np.ndarray) -> bool:
        """Copy the piece that begins at `begin` into `into` (n,); False if it has not come in yet."""
        if begin not in self._have:
            return False
        np.copyto(into, self._memory[begin : begin + into.nbytes])
        return True

    def in_place(self, begin: int, nbytes: int) -> tuple[Tensor, ...] | None:
        """Bytes [begin, begin + nbytes) where they are pinned, uint8, in their order; None if they are not.

        In parts, because a copy must not reach from one pinned part of memory into another.
        """
        if not self.pinned or self._bytes is None:
            return None
        end = begin + nbytes
        cuts = (begin, *range((begin // PART + 1) * PART, end, PART), end)
        return tuple(self._bytes[first:last] for first, last in pairwise(cuts))

    def pin(self, driver: Any, stopped: Callable[[], bool]) -> str:
        """Pin all of it: why it stays ordinary memory, empty if it is pinned or was released meanwhile.

        The calling thread has the GPU's context. What was pinned of it when the driver refuses, or when
        `stopped()` says so, is given back.
        """
        places: list[int] = []
        address, size = address_of(self._mapped), len(self._mapped)
        refusal = ""
        while (done := len(places) * PART) < size:
            with self._lock:  # so that what is released is given back before a call or after it
                if self._released or stopped():
                    refusal = "stopped"
                    break
                if not places:
                    # Not at exit: the stream's own end, which runs then, has let the copies finish before.
                    self._unpin = unpin = weakref.finalize(self, unregister, driver, places, self._mapped)
                    unpin.atexit = False
                status = driver.cuMemHostRegister_v2(
                    ctypes.c_void_p(address + done), ctypes.c_size_t(min(PART, size - done)), PORTABLE
                )
                if status != 0:
                    refusal = f"the driver pins no more (error {status})"
                    break
                places.append(address + done)
        with self._lock:
            self.pinned = not refusal and not self._released
            if not self.pinned:
                self._give_back()
        return "" if self._released else refusal

    @staticmethod
    def release(blocks: Iterable["CachedBlock"]) -> None:
        """Unpin blocks for good; no copy reads them any more. Waits for one call of the driver or two."""
        leaving = list(blocks)
        for block in leaving:
            block._released = True  # not with the lock, which a thread that pins may take again and again
        for block in leaving:
            with block._lock:
                block.pinned = False
                block._give_back()

    def _give_back(self) -> None:
        if self._unpin is not None:
            self._unpin()  # each part once, however often this is called
            self._unpin = None


class Pinner:
    """One thread in the background that pins cached blocks, one after the other; it never raises.

    lane: the copies' way to the GPU, whose context the thread needs. driver: libcuda as the ring uses it,
    None where nothing is to be pinned. refusal: why some memory stayed ordinary; nothing is tried after it.
    """

    def __init__(self, lane: Lane, driver: Any | None) -> None:
        self._lane, self._driver = lane, driver
        self._lock = threading.Lock()
        self._queue: deque[CachedBlock] = deque()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.refusal = "" if driver is not None else "the staging memory is not pinned either"

    def ask(self, blocks: Iterable[CachedBlock]) -> None:
        """Pin those of `blocks` that are complete and not pinned yet."""
        with self._lock:
            if self._stopped or self.refusal:
                return
            self._queue = deque(block for block in blocks if block.complete and not block.pinned)
            if self._queue and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="weights-pin", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until what was asked for is pinned, or refused."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def stop(self) -> None:
        """No more; the block that is being pinned is given back. Waits for one call of the driver."""
        self._stopped = True
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():  # a collector may call this there
            thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        try:
            self._lane.enter()
            while (block := self._next()) is not None:
                refusal = block.pin(self._driver, lambda: self._stopped)
                if refusal:
                    self._refuse(refusal)
        except Exception as error:  # noqa: BLE001 - what is not pinned goes through the ring
            self._refuse(first_sentence(error))
            self._next()

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self.refusal = self.refusal or reason

    def _next(self) -> CachedBlock | None:
        with self._lock:
            if not self._queue or self._stopped or self.refusal:
                self._queue.clear()
                self._thread = None  # whoever asks from now on starts another
                return None
            return self._queue.popleft()
