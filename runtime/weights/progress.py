"""How far a transfer is: bytes from many threads, a rate over the last seconds, the time that is left."""

import threading
import time
from collections import deque
from dataclasses import dataclass

WINDOW_SECONDS = 10.0


@dataclass(frozen=True)
class Progress:
    """Bytes and files of `total` and `files` that are done; rate in bytes/s and eta in s, None if unknown."""

    bytes: int
    total: int
    files_done: int
    files: int
    rate: float | None
    eta: float | None


class Meter:
    """Counts what threads report. A rate over the whole run would hide that a line has slowed down."""

    def __init__(self, total: int, files: int) -> None:
        self.total = total
        self.files = files
        self.received = 0
        self._done = 0
        self._guard = threading.Lock()
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def add(self, count: int) -> None:
        """`count` more bytes; below zero for bytes that were given up."""
        with self._guard:
            self.received += count

    def file_done(self) -> None:
        """One more file is finished."""
        with self._guard:
            self._done += 1

    def progress(self) -> Progress:
        """Where it stands now; called from one thread, regularly."""
        now = time.monotonic()
        with self._guard:
            received, done = self.received, self._done
        self._samples.append((now, received))
        while len(self._samples) > 2 and now - self._samples[0][0] > WINDOW_SECONDS:
            self._samples.popleft()
        then, before = self._samples[0]
        rate = (received - before) / (now - then) if now > then and received > before else None
        left = max(0, self.total - received)
        return Progress(received, self.total, done, self.files, rate, left / rate if rate else None)
