"""The threads behind a stream: readers fill chunks of the ring, one copier sends them on, in order.

    files, cache --readers--> chunks --copier, one lane--> slots and resident buffers --main thread--> blocks
    pinned cache ----------------------^

What comes when, and why nothing can deadlock, is in `visits`. What lies in pinned memory needs no chunk: the
readers pass it on to the copier as it is.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.memory.lane import Lane
from runtime.memory.ring import Chunk, Ring
from runtime.memory.source import ReadStopped
from runtime.memory.stored import PieceReader, StoredBlock, split
from runtime.memory.trace import Trace
from runtime.memory.visits import Epoch, Home, Prepared, Task

JOIN_SECONDS = 0.7  # how long `stop` waits for a thread that hangs in a read


class Feeder:
    """Brings blocks to the device ahead of the main thread. Only `stream.BlockStream` uses it.

    The main thread calls `begin`, then `take` and `release` for each block in order; `expect` says how many
    passes are to come, and `leave_out` what they do not need.
    """

    def __init__(
        self, blocks: Sequence[StoredBlock], reader: PieceReader, ring: Ring, lane: Lane, readers: int
    ) -> None:
        self.blocks, self.reader, self.ring, self.lane = blocks, reader, ring, lane
        self.slots: list[Home] = []
        self.residents: dict[int, Home] = {}
        self.trace: Trace | None = None
        self.waits, self.wait_seconds, self.copied_bytes = 0, 0.0, 0
        self._pieces = [split(block, ring.capacity) for block in blocks]
        self._lean = self._pieces
        self._readers = readers
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._copying = False
        self._prepared = Prepared()
        self.epoch = Epoch(self._pieces, self.residents, self.slots, None)

    # ---- the main thread

    def begin(self) -> Epoch:
        """A pass begins: its epoch, for `take` and `release`. Raises what a reader failed with meanwhile."""
        with self._changed:
            self._raise_failure()
            self.lane.begin()
            if self.epoch.broken or self.epoch.preloading:  # left half way
                self._rewind()
            epoch = self.epoch
            epoch.paused = False
            if epoch.allowed is not None:
                epoch.allowed = max(epoch.allowed, epoch.passes + 1)
            here = sum(home.loaded for home in self.residents.values()) == len(self.blocks)
        if not here:  # else another stream keeps the ring
            self.start()
        return epoch

    def start(self) -> None:
        """Fetch ahead from now on."""
        if self._stopping:
            raise RuntimeError("this stream of blocks is closed")
        self.ring.claim(self)
        with self._changed:
            self.epoch.paused = False
            if not self._threads:
                self._spawn()
            self._changed.notify_all()

    def expect(self, passes: int | None) -> None:
        """`passes` more passes will come after those that have begun; None: fetch ahead without end."""
        with self._changed:
            begun = self.epoch.passes + self.epoch.broken
            self.epoch.allowed = None if passes is None else begun + passes
            self._changed.notify_all()

    def leave_out(self, owners: Collection[str], after: int) -> None:
        """After `after` more passes, blocks come to slots without the matrices of the modules `owners`.

        Not in the middle of a pass. Raises ValueError where a block has no other matrices.
        """
        lean = [
            tuple(piece for piece in pieces if piece.matrix.owner not in owners) for pieces in self._pieces
        ]
        if not all(lean):
            raise ValueError(f"a block without {', '.join(sorted(owners))} has no matrices at all")
        with self._changed:
            if self.epoch.broken or self.epoch.lean_ahead:  # what is on its way may lack what is needed now
                self._rewind()
            self._lean = lean
            self.epoch.lean, self.epoch.whole = lean, self.epoch.passes + after if owners else None
            self._changed.notify_all()

    def take(self, epoch: Epoch, index: int) -> Home:
        """Wait until block `index` is on its way, and let what is computed next wait for its last byte."""
        with self._changed:
            if epoch is not self.epoch:
                raise RuntimeError("these blocks are iterated anew, or were placed anew, during an iteration")
            self._raise_failure()
            home = self.residents.get(index)
            if home is None:
                home, number = epoch.next_slot(), epoch.released
                self._wait_for(lambda: number < epoch.ready, epoch, index)
                epoch.held = index
                home.lean = epoch.is_lean(epoch.taken)
            else:
                resident = home
                self._wait_for(lambda: resident.loaded, epoch, index)
            epoch.taken += 1
            copied = home.copied
            if index in self.residents:
                home.copied = None  # waited for once and for all
        if copied is not None:
            self.lane.before_compute(copied)
        return home

    def release(self, epoch: Epoch, index: int) -> None:
        """Block `index` is computed, as far as the main thread goes: its slot may be filled anew."""
        with self._changed:
            if epoch is not self.epoch or epoch.held != index:
                return  # an iteration that was overtaken, or a resident
            epoch.next_slot().free = self.lane.after_compute()
            epoch.held = None
            epoch.released += 1
            self._changed.notify_all()

    def load_residents(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Wait until every resident block is on its way to the device. Not in the middle of a pass."""
        with self._changed:
            self._raise_failure()
            self._rewind(preloading=True)
            epoch, homes = self.epoch, dict(self.residents)
        self.start()
        for index, home in homes.items():
            with self._changed:
                self._wait_for(lambda home=home: home.loaded, epoch, index)  # type: ignore[misc]
            if on_bytes is not None:
                on_bytes(self.blocks[index].stored_bytes)
        with self._changed:
            self._rewind()

    def place(
        self, residents: dict[int, Home], slots: list[Home], cached: Sequence[int] | None = None
    ) -> None:
        """Other buffers from now on, and other blocks cached unless None.

        Returns when nothing writes to the old buffers any more; nor does a copy read a block that was cached.
        """
        with self._changed:
            self._failure = None  # whatever it was, it was about the blocks as they were placed
            self._rewind()
            self.lane.settle()
            if cached is not None:
                self.reader.set_cached(cached)  # with the lock: nobody passes on what is unpinned here
            self.residents, self.slots = residents, slots
            self._rewind()

    def drop_ahead(self) -> None:
        """Another stream needs the ring: drop what was fetched ahead, fetch nothing until the next pass."""
        with self._changed:
            self._rewind()
            self.epoch.paused = True

    def stop(self) -> bool:
        """End the threads and all copies; idempotent. False if a thread hangs in a read: it ends with that.

        A thread that hangs keeps its chunk and nothing else. No copy reads cached blocks afterwards.
        """
        with self._changed:
            patience = 0.0 if self._stopping else JOIN_SECONDS  # once is enough
            self._stopping = True
            last, self.epoch = self.epoch, Epoch(self._pieces, {}, [], 0)
            self._prepared.drop(self.ring)
            self._changed.notify_all()
        self.ring.wake()
        deadline = time.monotonic() + patience
        this = threading.current_thread()  # one of them, if it is where the collector found a dropped stream
        for thread in self._threads:
            if thread is not this:
                thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            # The copier, the first of them, never hangs in a read. It may wait for the GPU, as `settle` does.
            while self._copying and self._threads[:1] != [this]:
                self._changed.wait()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self.lane.settle()
        last.end()
        self.residents, self.slots = {}, []
        return not self._threads

    def _wait_for(self, ready: Callable[[], bool], epoch: Epoch, index: int) -> None:
        """Wait, lock held, until `ready()`; raises a thread's failure, RuntimeError when the epoch ends."""
        if ready():
            return
        began = time.perf_counter()
        mark = self.trace.mark_host() if self.trace is not None else None
        while not ready():
            self._raise_failure()
            if self._stopping or epoch is not self.epoch:
                raise RuntimeError("this stream of blocks was closed or placed anew while one was waited for")
            self._changed.wait()
        self.waits += 1
        self.wait_seconds += time.perf_counter() - began
        if self.trace is not None and mark is not None:
            self.trace.add("wait", str(index), mark, self.trace.mark_host())

    def _raise_failure(self) -> None:
        """Raise what a thread failed with, once; the epoch is over then."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._rewind()
            raise failure

    def _rewind(self, preloading: bool = False) -> None:
        """End the epoch (lock held): drop what is on its way; slots are free after what computes now."""
        old = self.epoch
        allowed, whole = (
            None if passes is None else max(0, passes - old.passes) for passes in (old.allowed, old.whole)
        )
        self.epoch = Epoch(self._pieces, {}, [], 0)  # nothing happens in it while the lock is let go
        while self._copying:
            self._changed.wait()
        old.end()
        self._prepared.drop(self.ring)
        self.epoch = Epoch(self._pieces, self.residents, self.slots, allowed, preloading, self._lean, whole)
        for slot in self.slots:
            slot.free = self.lane.after_compute()
        self._changed.notify_all()

    # ---- the threads

    def _spawn(self) -> None:
        for number, work in enumerate([self._copy] + [self._read] * self._readers):
            name = f"weights-{f'read-{number}' if number else 'copy'}"
            # Daemons: a thread that hangs in a read must not keep the process from ending.
            thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Repeat a thread's work until the end, handing every failure to the main thread."""
        with torch.inference_mode():  # buffers are written here whatever mode the main thread is in
            entered = False
            while not self._stopping:
                try:
                    if not entered:
                        self.lane.enter()
                        entered = True
                    work()
                except BaseException as error:  # noqa: BLE001 - raised again by the main thread
                    self._fail(error, self.epoch)

    def _fail(self, error: BaseException, epoch: Epoch) -> None:
        """Leave a failure to the main thread; one of an epoch that is over concerns nobody."""
        with self._changed:
            if epoch is self.epoch and self._failure is None:
                self._failure = error
            self._changed.notify_all()
            while self._failure is not None and not self._stopping:
                self._changed.wait()

    def _read(self) -> None:
        """One reader's round: a chunk, the next piece that is not pinned, its bytes."""
        # A round is a call, so that a thread which waits for the next one holds on to no buffer.
        with self._changed:
            while not self._stopping and not self._must_read():
                self._changed.wait()
        chunk = None if self._stopping else self.ring.acquire(lambda: self._stopping)
        if chunk is None:
            return
        with self._changed:  # only with a chunk in hand: the earliest piece must never be without one
            task = self.epoch.pop() if self._must_read() else None
        if task is None:
            self.ring.release(chunk)
        else:
            self._fill(task, chunk)

    def _must_read(self) -> bool:
        """Pass on the next pieces as far as they are pinned, lock held; whether one is next that is not."""
        passed = False
        parts: tuple[Tensor, ...] | None = None
        task = None
        while self._failure is None and not self._stopping and (task := self.epoch.peek()) is not None:
            parts = self.reader.in_place(task.visit.index, task.piece)
            if parts is None or self._prepared.full:
                break
            self.epoch.pop()
            self.reader.count_cached(task.piece)
            self._prepared.put(task, None, parts)
            passed = True
        if passed:
            self._changed.notify_all()
        return task is not None and parts is None and self._failure is None and not self._stopping

    def _fill(self, task: Task, chunk: Chunk) -> None:
        """Read one piece into the chunk; it is the copier's then, or back in the ring."""
        trace = self.trace
        begin = trace.mark_host() if trace is not None else None
        kept = False
        try:
            data = self.reader.fill(task.visit.index, task.piece, chunk, lambda: task.epoch is not self.epoch)
            if trace is not None and begin is not None:
                trace.add("read", str(task.visit.index), begin, trace.mark_host())
            with self._changed:
                if task.epoch is self.epoch:
                    self._prepared.put(task, chunk, (data,))
                    kept = True
                    self._changed.notify_all()
        except ReadStopped:
            return
        except Exception as error:  # noqa: BLE001 - raised again by the main thread
            self._fail(error, task.epoch)
        finally:
            if not kept:
                self.ring.release(chunk)

    def _can_copy(self) -> bool:
        """Whether the next piece in order is read and its slot is released, lock held."""
        task = self._prepared.first(self.epoch)
        if self._failure is not None or task is None:
            return False
        number = task.visit.number
        return number is None or number < self.epoch.released + len(self.slots)

    def _copy(self) -> None:
        """The copier's round: what is next in order, as soon as it is read and its slot released."""
        with self._changed:
            while not self._stopping and not self._can_copy():
                self._changed.wait()
            if self._stopping:
                return
            batch = self._prepared.take(self.epoch)
            self._copying = True
        try:
            for task, chunk, parts in batch:
                event: Any = None
                try:
                    event = self._send(task, parts)
                finally:
                    if chunk is not None:
                        self.ring.release(chunk, event)
        finally:
            with self._changed:  # only here, where nothing knows the buffer any more: it may be about to go
                self._copying = False
                self._changed.notify_all()

    def _send(self, task: Task, parts: Sequence[Tensor]) -> Any:
        """Copy one piece; the last of a visit makes its block ready. Returns the event of the copy."""
        home, piece, trace = task.epoch.home_of(task.visit), task.piece, self.trace
        begin, event = piece.position, None
        for part in parts:
            target = home.buffer[begin : begin + part.nbytes]
            begin += part.nbytes
            event, times = self.lane.copy(target, part, home.free, trace)
            home.free = None  # the lane is in order: one wait covers what follows
            if trace is not None and times is not None:
                trace.add("copy", str(task.visit.index), *times)
        with self._changed:
            self.copied_bytes += piece.nbytes
            task.visit.left -= 1
            if task.visit.left == 0 and task.epoch is self.epoch:
                home.copied = event
                if task.visit.number is None:
                    home.loaded = True
                else:
                    task.epoch.ready += 1
        return event
