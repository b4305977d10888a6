"""The ring: chunks come back when their copy is done; memory is pinned as far as the driver lets it."""

import ctypes
import gc
import threading
import time
from typing import Any

import pytest

from runtime.memory import ring as ring_module
from runtime.memory.ring import Ring
from runtime.memory.source import PAGE, SLACK
from tests.unit.stream_fixtures import Driver

CHUNK = 4 * PAGE


class Pending:
    """The event of a copy that is still running."""

    def __init__(self) -> None:
        self.done = False
        self.queries = 0

    def query(self) -> bool:
        self.queries += 1
        return self.done


def never() -> bool:
    return False


def test_pins_everything_and_gives_it_back() -> None:
    driver = Driver(limit=10 * CHUNK)
    ring = Ring(CHUNK, 3, pinned=True, driver=driver)
    assert ring.pinned and ring.chunks == 3 and ring.nbytes == 3 * CHUNK and ring.capacity == CHUNK - SLACK
    assert list(driver.pinned.values()) == [CHUNK] * 3
    assert ring.description == "3 chunks of 0.015625 MiB, pinned"
    ring.close()
    ring.close()
    assert not driver.pinned


def test_a_dropped_ring_is_unpinned_too() -> None:
    driver = Driver(limit=10 * CHUNK)
    ring = Ring(CHUNK, 2, pinned=True, driver=driver)
    assert ring.acquire(never) is not None
    del ring
    gc.collect()
    assert not driver.pinned


def test_a_limit_of_pinning_makes_the_ring_shorter() -> None:
    driver = Driver(limit=2 * CHUNK + 100)
    ring = Ring(CHUNK, 5, pinned=True, driver=driver)
    assert ring.pinned and ring.chunks == 2 and ring.nbytes == 2 * CHUNK
    assert ring.acquire(never) is not None and ring.acquire(never) is not None
    assert ring.acquire(lambda: True) is None  # there is no third
    ring.close()


@pytest.mark.parametrize("limit", [0, CHUNK])
def test_too_little_to_pin_means_ordinary_memory(limit: int) -> None:
    driver = Driver(limit)
    ring = Ring(CHUNK, 4, pinned=True, driver=driver)
    assert not ring.pinned and ring.chunks == 4 and not driver.pinned
    assert "not pinned: the driver pins no more than" in ring.description and "error 2" in ring.description
    ring.close()


def test_no_driver_means_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(device: Any) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ring_module, "cuda_driver", absent)
    ring = Ring(CHUNK, 2, pinned=True)
    assert not ring.pinned and "the CUDA driver library is not there" in ring.description
    assert Ring(CHUNK, 2, pinned=False).description == "2 chunks of 0.015625 MiB, not pinned"


def test_chunks_are_aligned_and_one_memory() -> None:
    ring = Ring(CHUNK, 3, pinned=False)
    seen = set()
    for number in range(3):
        chunk = ring.acquire(never)
        assert chunk is not None
        address = ctypes.addressof(ctypes.c_char.from_buffer(chunk.space))
        assert address % PAGE == 0 and chunk.bytes.data_ptr() == address
        chunk.space[5] = number + 1
        assert int(chunk.bytes[5]) == number + 1 and len(chunk.space) == chunk.bytes.numel() == CHUNK
        seen.add(address)
    assert len(seen) == 3


@pytest.mark.parametrize(("chunk", "chunks"), [(CHUNK + 1, 2), (SLACK, 2), (CHUNK, 0)])
def test_sizes_that_cannot_be_are_refused(chunk: int, chunks: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        Ring(chunk, chunks, pinned=False)


def test_a_chunk_whose_copy_runs_is_not_given_out() -> None:
    ring = Ring(CHUNK, 1, pinned=False)
    first = ring.acquire(never)
    assert first is not None
    copy = Pending()
    ring.release(first, copy)
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(ring.acquire(never)))
    waiting.start()
    deadline = time.monotonic() + 5
    while copy.queries < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not got and copy.queries >= 4
    copy.done = True
    waiting.join(1)
    assert got == [first] and first.busy is None


def test_the_oldest_copy_comes_back_first() -> None:
    ring = Ring(CHUNK, 3, pinned=False)
    chunks = [ring.acquire(never) for _ in range(3)]
    for number in (2, 0, 1):
        chunk = chunks[number]
        assert chunk is not None
        ring.release(chunk)
    assert [chunks.index(ring.acquire(never)) for _ in range(3)] == [2, 0, 1]


def test_waiting_ends_when_it_is_told_to() -> None:
    ring = Ring(CHUNK, 1, pinned=False)
    chunk = ring.acquire(never)
    assert chunk is not None
    stop = threading.Event()
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(ring.acquire(stop.is_set)))
    waiting.start()
    stop.set()
    ring.wake()
    waiting.join(1)
    assert got == [None]
    ring.release(chunk, Pending())
    assert ring.acquire(stop.is_set) is None  # the copy never ends, and yet this does
    stop.clear()
    assert chunk.busy is not None and ring.acquire(lambda: True) is None
    chunk.busy = None
    assert ring.acquire(never) is chunk  # it was not lost


def test_a_closed_ring_refuses() -> None:
    ring = Ring(CHUNK, 1, pinned=False)
    ring.close()
    with pytest.raises(RuntimeError, match="the ring is closed"):
        ring.acquire(never)


def test_the_one_before_gives_back_what_it_holds() -> None:
    class User:
        def __init__(self) -> None:
            self.dropped = 0

        def drop_ahead(self) -> None:
            self.dropped += 1

    ring = Ring(CHUNK, 1, pinned=False)
    one, two = User(), User()
    ring.claim(one)
    ring.claim(one)
    assert one.dropped == 0
    ring.claim(two)
    assert (one.dropped, two.dropped) == (1, 0)
    del two
    gc.collect()
    ring.claim(one)  # nobody is there any more
    assert one.dropped == 1


def test_closing_waits_for_the_copies() -> None:
    ring = Ring(CHUNK, 2, pinned=True, driver=Driver(10 * CHUNK))
    chunk = ring.acquire(never)
    assert chunk is not None
    copy = Pending()
    ring.release(chunk, copy)
    closing = threading.Thread(target=ring.close)
    closing.start()
    time.sleep(0.05)
    assert ring.pinned
    copy.done = True
    closing.join(1)
    assert not ring.pinned
