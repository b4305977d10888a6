"""Ctrl-C and `docker stop` end a run in time, even while the program waits for the GPU.

Python sees a signal between two of its own steps. A wait for the GPU is one step, and on a slow card many
seconds long: the queue of kernels ahead of it may be half a denoise step. What a run has done is on the disk
at any moment, so nothing is lost by leaving without waiting.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE = 6.0
"""Seconds for an orderly end before the process leaves as it is; `docker stop` kills after 10."""

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def leaving_in_time(last_words: Callable[[], int]) -> Iterator[None]:
    """Within the block, a signal that Python cannot answer in GRACE seconds ends the process.

    `last_words` then tells the user, from another thread, and returns the exit code. Does nothing outside of
    the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        while numbers := os.read(reader, 64):  # empty when the block has ended
            if any(number in ENDING for number in numbers):
                if not over.wait(GRACE):
                    os._exit(last_words())
                break
        os.close(reader)

    watcher = threading.Thread(target=watch, name="interrupt", daemon=True)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join(timeout=1)
