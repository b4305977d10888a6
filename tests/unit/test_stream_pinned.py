"""Cached blocks that are pinned where they lie: the same bytes, not through the ring, and all given back."""

import gc
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtime.checkpoint import Checkpoint
from runtime.errors import WeightsError
from runtime.memory import cached as cached_module
from runtime.memory import stream as stream_module
from runtime.memory import visits
from runtime.memory.cached import CachedBlock
from runtime.memory.load import load_streamed
from runtime.memory.ring import Ring
from runtime.memory.source import PAGE
from runtime.memory.stream import BlockStream
from tests.unit.stream_fixtures import (
    CHUNK,
    FP32,
    Driver,
    FakeEvent,
    FakeLane,
    Faults,
    Placed,
    bare,
    distance,
    inputs_of,
    resident,
    streamed,
    written,
)
from tests.unit.test_stream import Watched

ALL = Placed((), (0, 1, 2), 2)
PART = 3 * PAGE  # pieces of the tiny model lie across its ends


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three blocks in per-block files."""
    return written(tmp_path_factory.mktemp("fp8"), "transformer", "fp8", "blocks")


@pytest.fixture(scope="module")
def expected(fp8: Checkpoint) -> Tensor:
    with torch.inference_mode():
        return resident(fp8)(*inputs_of("transformer"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_module, "PART", PART)
    monkeypatch.setattr(stream_module, "is_wsl", lambda: False)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def ring(driver: Driver) -> Iterator[Ring]:
    made = Ring(CHUNK, 4, pinned=True, driver=driver)
    driver.calls = 0
    yield made
    made.close()
    assert not driver.pinned


@torch.inference_mode()
def run(model: nn.Module) -> Tensor:
    return model(*inputs_of("transformer"))


def beside(driver: Driver, ring: Ring) -> int:
    """Bytes that are pinned and not the ring's."""
    return sum(driver.pinned.values()) - ring.nbytes


def parts_of(stream: BlockStream) -> int:
    """Calls of the driver that one block takes."""
    return -(-stream._stored[0].nbytes // PART)


# ------------------------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize(
    "placement", [ALL, Placed((), (0, 1, 2), 1), Placed((1,), (0, 2), 2), Placed((), (1,), 1)], ids=str
)
@pytest.mark.parametrize("ahead", [1, 5, visits.AHEAD])
def test_what_is_pinned_gives_the_same_and_needs_no_ring(
    fp8: Checkpoint,
    expected: Tensor,
    ring: Ring,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    placement: Placed,
    ahead: int,
) -> None:
    monkeypatch.setattr(visits, "AHEAD", ahead)
    count, streaming = len(placement.cached), 3 - len(placement.resident)
    with streamed(fp8, placement, ring=ring) as (model, stream):
        stream.expect(1)
        assert distance(run(model), expected) == 0 and stream.pinned_bytes == 0
        stream.pin_cached(wait=True)
        assert stream.pinned_bytes == stream.cache_bytes == count * stream._stored[0].nbytes
        assert stream.pinned_bytes <= beside(driver, ring) < stream.pinned_bytes + count * PAGE
        assert driver.calls == count * parts_of(stream) and not stream.pin_refusal
        given: list[int] = []
        acquire = ring.acquire
        monkeypatch.setattr(ring, "acquire", lambda stopped: given.append(1) or acquire(stopped))
        before, payload = stream.counts, stream._stored[0].stored_bytes
        stream.expect(3)
        for _ in range(3):
            assert distance(run(model), expected) == 0
        after, stored = stream.counts, streaming - count
        assert bool(given) == bool(stored)  # what is pinned needs no chunk
        assert after.cache_bytes - before.cache_bytes == 3 * count * payload
        assert after.copied_bytes - before.copied_bytes == 3 * streaming * payload
        read = after.reads.disk_bytes + after.reads.cached_bytes
        assert read == (3 + 3 * stored) * payload
        stream.pin_cached(wait=True)  # there is nothing left to pin
        assert driver.calls == count * parts_of(stream)
    assert driver.given_back == driver.calls and beside(driver, ring) == 0


def test_parts_of_a_piece_end_where_pinned_memory_does(fp8: Checkpoint, ring: Ring, driver: Driver) -> None:
    """A copy from two neighbours that were pinned apart is refused by some drivers."""
    with streamed(fp8, ALL, ring=ring) as (model, stream):
        assert stream._reader.in_place(0, stream._feeder._pieces[0][0]) is None
        run(model)
        stream.pin_cached(wait=True)
        several = 0
        for index in range(3):
            for piece in stream._feeder._pieces[index]:
                parts = stream._reader.in_place(index, piece)
                assert parts is not None and sum(part.nbytes for part in parts) == piece.nbytes
                assert all(driver.holds(part.data_ptr(), part.nbytes) for part in parts)
                several += len(parts) > 1
        assert several


def test_what_is_left_out_is_left_out_of_pinned_blocks_too(fp8: Checkpoint, ring: Ring) -> None:
    with streamed(fp8, ALL, ring=ring) as (model, stream):
        stream.expect(1)
        run(model)
        stream.pin_cached(wait=True)
        less = sum(m.nbytes for m in stream._stored[0].matrices if m.owner == "cross_attn.k")
        stream.leave_out(("cross_attn.k",), after=1)
        before = stream.counts.copied_bytes
        stream.expect(2)
        for _ in range(2):
            list(stream)
        assert stream.counts.copied_bytes - before == 6 * stream._stored[0].stored_bytes - 3 * less


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("beyond", [0, PART])
def test_what_the_driver_refuses_stays_ordinary_memory(
    fp8: Checkpoint, expected: Tensor, ring: Ring, driver: Driver, blocks: int, beyond: int
) -> None:
    with streamed(fp8, ALL, ring=ring) as (model, stream):
        run(model)
        size = -(-stream._stored[0].nbytes // PAGE) * PAGE
        driver.limit = ring.nbytes + blocks * size + beyond
        stream.pin_cached(wait=True)
        assert stream.pinned_bytes == blocks * stream._stored[0].nbytes
        assert beside(driver, ring) == blocks * size  # nothing of a block that is not pinned whole
        assert stream.pin_refusal == "the driver pins no more (error 2)"
        calls = driver.calls
        driver.limit = 2**40
        stream.pin_cached(wait=True)
        assert driver.calls == calls  # not asked again
        for _ in range(3):
            assert distance(run(model), expected) == 0


def test_a_driver_that_fails_is_no_error(
    fp8: Checkpoint, expected: Tensor, ring: Ring, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = driver.cuMemHostRegister_v2

    def broken(*given: Any) -> int:
        if driver.calls == 2:
            raise OSError("the library is gone")
        return register(*given)

    monkeypatch.setattr(driver, "cuMemHostRegister_v2", broken)
    with streamed(fp8, ALL, ring=ring) as (model, stream):
        run(model)
        stream.pin_cached(wait=True)
        assert stream.pinned_bytes == 0 and "the library is gone" in stream.pin_refusal
        stream.pin_cached(wait=True)
        assert distance(run(model), expected) == 0
    assert beside(driver, ring) == 0


def test_nothing_is_pinned_where_that_is_scarce_or_of_no_use(
    fp8: Checkpoint, ring: Ring, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with streamed(fp8, ALL, ring=ring) as (model, stream):
        stream.pin_cached(wait=True)  # nothing is complete yet
        assert driver.calls == 0 and not stream.pin_refusal
        run(model)
        monkeypatch.setattr(stream_module, "is_wsl", lambda: True)
        stream.pin_cached(wait=True)
        assert driver.calls == 0 and "WSL" in stream.pin_refusal
    with streamed(fp8, ALL) as (model, stream):  # as on the CPU
        monkeypatch.setattr(stream_module, "is_wsl", lambda: False)
        run(model)
        stream.pin_cached(wait=True)
        assert stream.pinned_bytes == 0 and "not pinned" in stream.pin_refusal


# ------------------------------------------------------------------------------------------------ giving back


class Checking(FakeLane):
    """A GPU whose copies come late: each looks whether the memory that it reads is pinned still."""

    def __init__(self, driver: Driver, seed: int) -> None:
        super().__init__(0.002, 0.001, seed)
        self.driver, self.unpinned, self.copies = driver, 0, 0

    def copy(self, target: Tensor, source: Tensor, after: Any, trace: Any) -> tuple[Any, None]:
        if after is not None:
            self.side.put(after.wait)
        address, nbytes = source.data_ptr(), source.nbytes
        to, of = target.numpy(), source.numpy()

        def work() -> None:
            self.copies += 1
            self.unpinned += not self.driver.holds(address, nbytes)
            to[:] = of
            self.unpinned += not self.driver.holds(address, nbytes)

        self.side.put(work)
        return FakeEvent(self.side), None


@pytest.fixture
def lane(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checking]:
    made = Checking(driver, seed=3)
    monkeypatch.setattr(stream_module, "lane_to", lambda device: made)
    yield made
    made.end()
    assert made.copies and not made.unpinned


@pytest.mark.parametrize("end", ["resize", "park", "close", "left", "failed"])
def test_nothing_is_unpinned_while_a_copy_reads_it(
    fp8: Checkpoint, ring: Ring, driver: Driver, lane: Checking, end: str
) -> None:
    """Copies wait in the GPU's queue when the placement changes, or the stream ends."""
    generator = random.Random(7)
    system = Faults()
    with streamed(fp8, ALL, ring=ring, system=system) as (_, stream):
        watched = Watched(stream, resident(fp8), lane.compute)
        for _ in range(2):
            for index, block in enumerate(stream):
                watched.step(index, block)
            stream.pin_cached(wait=True)
        assert stream.pinned_bytes == stream.cache_bytes
        for _ in range(4):
            stop = generator.randrange(3)
            for index, block in enumerate(stream):
                watched.step(index, block)
                if index == stop:
                    break
            if end == "resize":
                kept = tuple(sorted(generator.sample(range(3), generator.randrange(3))))
                stream.resize((), kept, generator.randrange(1, 3))
                held = {index for index, block in stream._reader.cached.items() if block.pinned}
                assert held <= set(kept)
                assert beside(driver, ring) == len(held) * -(-stream._stored[0].nbytes // PAGE) * PAGE
                for _ in range(2):
                    for index, block in enumerate(stream):
                        watched.step(index, block)
                stream.pin_cached(wait=True)
                assert stream.pinned_bytes == stream.cache_bytes
            elif end == "park":
                stream.park()
                assert stream.pinned_bytes == stream.cache_bytes  # what is in RAM stays there
            elif end == "failed":
                stream.resize((), (0, 1), 2)
                system.fail_after = system.reads
                with pytest.raises(WeightsError):
                    list(stream)
                system.fail_after = None
                stream.resize((), (0,), 1)
                stream.pin_cached(wait=True)
            elif end != "left":
                break
    lane.compute.drain()
    assert not watched.wrong and watched.checked > 6
    assert beside(driver, ring) == 0 and driver.given_back == driver.calls


def test_a_stream_that_is_dropped_is_unpinned(fp8: Checkpoint, ring: Ring, driver: Driver) -> None:
    before = threading.active_count()
    model = bare(fp8)
    stream: BlockStream | None = load_streamed(
        model,
        fp8,
        placement=ALL,
        ring=ring,
        dtype=torch.bfloat16,
        device="cpu",
        fp32_parameters=FP32["transformer"],
    )
    run(model)
    assert stream is not None
    stream.pin_cached(wait=True)
    run(model)
    assert stream.pinned_bytes and beside(driver, ring) > 0
    del stream, model
    gc.collect()
    assert beside(driver, ring) == 0 and driver.given_back == driver.calls > 0
    assert threading.active_count() == before


def test_a_block_that_is_dropped_is_unpinned(driver: Driver) -> None:
    block = CachedBlock(5 * PAGE + 7, 8)
    block.put(0, np.arange(8, dtype=np.uint8))
    assert block.complete and not block.pin(driver, lambda: False) and block.pinned
    assert sum(driver.pinned.values()) == 6 * PAGE and len(driver.pinned) == 2
    del block
    gc.collect()
    assert not driver.pinned


@pytest.mark.parametrize("how", ["close", "dropped", "resize"])
def test_what_ends_while_it_is_pinned_does_not_wait_for_the_rest(
    fp8: Checkpoint, ring: Ring, driver: Driver, how: str
) -> None:
    model = bare(fp8)
    options: Any = {"dtype": torch.bfloat16, "device": "cpu", "fp32_parameters": FP32["transformer"]}
    stream = load_streamed(model, fp8, placement=ALL, ring=ring, **options)
    run(model)
    driver.seconds = 0.03
    stream.pin_cached()
    everything = 3 * parts_of(stream)
    while driver.calls < 2:
        time.sleep(0.001)
    began = time.monotonic()
    if how == "close":
        stream.close()
    elif how == "resize":
        stream.resize((), (), 1)
    else:
        del stream, model
        gc.collect()
    took, calls = time.monotonic() - began, driver.calls
    print(f"{how} took {took:.3f} s, {calls} of {everything} calls were made")
    assert calls < everything and took < 0.7 + 5 * driver.seconds
    assert beside(driver, ring) == 0
    time.sleep(3 * driver.seconds)
    assert beside(driver, ring) == 0 and driver.given_back == driver.calls
    if how == "resize":
        run(model)
        stream.close()
        stream.pin_cached(wait=True)  # closed: nothing happens
    assert driver.calls <= calls + 1 and not [t for t in threading.enumerate() if t.name == "weights-pin"]


def test_a_read_that_hangs_keeps_nothing_pinned(fp8: Checkpoint, ring: Ring, driver: Driver) -> None:
    system = Faults()
    with streamed(fp8, Placed((), (0, 1), 1), ring=ring, system=system) as (model, stream):
        stream.expect(1)
        run(model)
        stream.pin_cached(wait=True)
        run(model)
        system.slept.clear()
        system.delay = 2.0
        stream.expect(1)
        assert system.slept.wait(5)
        threads = [thread for thread in stream._feeder._threads if "read" in thread.name]
        began = time.monotonic()
        stream.close()
        took = time.monotonic() - began
        print(f"close took {took:.3f} s while a read hung")
        assert took < 1.2 and any(thread.is_alive() for thread in threads)
        assert beside(driver, ring) == 0 and stream.cache_bytes == 0
        for thread in threads:
            thread.join(4)
    assert driver.given_back == driver.calls


# ---------------------------------------------------------------------------------------------- reading ahead


def test_readers_do_not_run_ahead_without_end(
    fp8: Checkpoint, expected: Tensor, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes without end, and no chunk that would bound them."""
    monkeypatch.setattr(visits, "AHEAD", 7)
    with streamed(fp8, ALL, ring=ring) as (model, stream):
        stream.expect(1)
        run(model)
        stream.pin_cached(wait=True)
        stream.expect(None)
        prepared, feeder = stream._feeder._prepared, stream._feeder
        for _ in range(3):
            deadline = time.monotonic() + 5
            while not prepared.full and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            with feeder._changed:
                assert len(prepared._ready) == 7 and prepared.full
                sent, planned = feeder.epoch.copied, feeder.epoch._count
                pieces = len(feeder._pieces[0])
                assert planned <= sent + 7 + pieces
            assert distance(run(model), expected) == 0


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_goes_on(
    fp8: Checkpoint, expected: Tensor, driver: Driver, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """One chunk or few, one slot or two, one reader or many, pinned and read blocks in any order."""
    generator = random.Random(seed)
    monkeypatch.setattr(visits, "AHEAD", generator.choice([1, 2, 30]))
    chunks = generator.choice([2, 3])
    ring = Ring(CHUNK, chunks, pinned=True, driver=driver)
    cached = tuple(sorted(generator.sample(range(3), generator.randrange(1, 4))))
    placement = Placed((), cached, generator.choice([1, 2]))
    with streamed(fp8, placement, ring=ring, readers=generator.choice([1, 4])) as (model, stream):
        run(model)
        size = -(-stream._stored[0].nbytes // PAGE) * PAGE
        driver.limit = ring.nbytes + generator.randrange(1, len(cached) + 1) * size
        stream.pin_cached()  # while the next passes run
        for number in range(8):
            if number % 3 == 2:
                for _ in stream:
                    break
            assert distance(run(model), expected) == 0
        stream.pin_cached(wait=True)
        assert stream.pinned_bytes and distance(run(model), expected) == 0
    ring.close()
    assert not driver.pinned


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_children_do_not_get_the_memory() -> None:
    block = CachedBlock(64 * PAGE, 64 * PAGE)
    block.put(0, np.ones(64 * PAGE, dtype=np.uint8))
    address = block._memory.ctypes.data
    flags, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and line.startswith("VmFlags"):
            flags = line
    assert " dc" in flags  # not copied by a fork
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert " hg" in flags
    child = os.fork()
    if child == 0:  # the mapping is not there, so that not even reading its list finds it
        there = any(
            int(head.split("-")[0], 16) <= address < int(head.split("-")[1].split()[0], 16)
            for head in Path("/proc/self/maps").read_text().splitlines()
        )
        os._exit(1 if there else 0)
    assert os.waitpid(child, 0)[1] == 0
