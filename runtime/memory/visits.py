"""Which block comes next, into which buffer: the bookkeeping of a stream, without threads.

A visit is one coming of a block to the device. Visits of blocks that stream are numbered and go to the
slots in turn, visit v to slot v mod n; v may be copied once the main thread has released visit v - n. A
resident block has one visit, into its lasting buffer. A visit to a slot is lean, and brings only some
matrices, where its pass needs no others. Readers take the pieces of the visits in order, so the earliest
piece that is not copied yet always has a chunk (or lies in pinned memory and needs none), and whatever waits
waits for something earlier: there is no deadlock, with one chunk, one slot or many readers.

An epoch is a run of visits without a break. A pass that is left half way, a failure or another placement ends
it; the next pass begins another.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from runtime.memory.ring import Chunk, Ring
from runtime.memory.stored import Layout, Piece


@dataclass(eq=False)
class Home:
    """A buffer on the device: a slot, or the lasting place of one resident block."""

    buffer: Tensor  # (nbytes,) uint8
    free: Any  # event from which on it may be written
    loaded: bool = False  # residents: all copies are enqueued
    lean: bool = False  # slots: only some matrices of the block that is computed are there
    copied: Any = None  # event of the last copy
    views: dict[Layout, tuple[Tensor, ...]] = field(default_factory=dict)  # of the buffer, as blocks want it


@dataclass(eq=False)
class Visit:
    """One coming of block `index` to the device; `number` among those to slots, None for a resident."""

    index: int
    number: int | None
    pieces: Sequence[Piece]
    left: int = field(init=False)  # pieces that are not copied yet

    def __post_init__(self) -> None:
        self.left = len(self.pieces)


@dataclass(frozen=True, eq=False)
class Task:
    """One piece of one visit; `number` orders the pieces of an epoch."""

    epoch: "Epoch"
    number: int
    visit: Visit
    piece: Piece


class Epoch:
    """The visits of one epoch, planned one at a time. Its fields belong to the feeder's lock.

    pieces: of each block. allowed: passes of this epoch that may be fetched; None: no end is known.
    preloading: fetch the resident blocks and nothing else. lean: the pieces that passes from number `whole`
    on need of the blocks that stream; None: all passes need all.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[Piece]],
        residents: Mapping[int, Home],
        slots: Sequence[Home],
        allowed: int | None,
        preloading: bool = False,
        lean: Sequence[Sequence[Piece]] = (),
        whole: int | None = None,
    ) -> None:
        self.pieces, self.residents, self.slots = pieces, residents, slots
        self.allowed = allowed
        self.lean, self.whole = lean, whole
        self.paused = False  # another stream has the ring
        self.taken = 0  # blocks that the main thread has taken
        self.held: int | None = None  # the block in a slot that it computes
        self.released = 0  # visits to slots that are computed
        self.ready = 0  # visits to slots whose copies are all enqueued
        self.copied = 0  # pieces that are given to the lane
        self.preloading = preloading
        self._visits = self._at = self._count = 0  # visits to slots, blocks and pieces that are planned
        self._planned: set[int] = set()  # residents that this epoch has seen to
        self._tasks: deque[Task] = deque()

    @property
    def passes(self) -> int:
        """Passes that are done."""
        return self.taken // len(self.pieces)

    @property
    def broken(self) -> bool:
        """Whether a pass was left half way."""
        return bool(self.taken % len(self.pieces)) or self.held is not None

    @property
    def lean_ahead(self) -> bool:
        """Whether a lean visit is planned for a pass that has not begun."""
        return self.whole is not None and self._at > max(self.taken, self.whole * len(self.pieces))

    def is_lean(self, at: int) -> bool:
        """Whether block number `at`, counted through all passes, comes without what is left out."""
        return self.whole is not None and at // len(self.pieces) >= self.whole

    def next_slot(self) -> Home:
        """The slot of the block that streams next in the main thread."""
        return self.slots[self.released % len(self.slots)]

    def home_of(self, visit: Visit) -> Home:
        """Where a visit of this epoch goes to."""
        if visit.number is None:
            return self.residents[visit.index]
        return self.slots[visit.number % len(self.slots)]

    def end(self) -> None:
        """Let go of everything: whoever still knows this epoch must not keep its buffers."""
        self.residents, self.slots = {}, ()
        self._tasks.clear()

    def peek(self) -> Task | None:
        """The next piece to read, None when nothing is to be fetched now."""
        while not self._tasks:
            visit = None if self.paused else self._next_visit()
            if visit is None:
                return None
            for piece in visit.pieces:
                self._tasks.append(Task(self, self._count, visit, piece))
                self._count += 1
        return self._tasks[0]

    def pop(self) -> Task | None:
        """The same, and it is the caller's to read."""
        return self._tasks.popleft() if self.peek() is not None else None

    def _next_visit(self) -> Visit | None:
        """Plan one visit more."""
        if self.preloading:
            return next((visit for i in self.residents if (visit := self._resident(i)) is not None), None)
        count = len(self.pieces)
        while self.allowed is None or self._at < self.allowed * count:
            index = self._at % count
            if index not in self.residents:
                if not self.slots:
                    return None  # nothing is placed
                pieces = self.lean if self.is_lean(self._at) else self.pieces
                self._at += 1
                self._visits += 1
                return Visit(index, self._visits - 1, pieces[index])
            if len(self._planned) == count:
                return None  # all blocks are resident: there is no end of passes to plan
            self._at += 1
            visit = self._resident(index)
            if visit is not None:
                return visit
        return None

    def _resident(self, index: int) -> Visit | None:
        """The one visit of a resident block, unless it is there or on its way."""
        if index in self._planned:
            return None
        self._planned.add(index)
        loaded = self.residents[index].loaded
        return None if loaded else Visit(index, None, self.pieces[index])


AHEAD = 64
"""Pieces in pinned memory that are passed on and not sent. More than the slots take, so that what is to be
read from the disk behind them is seen in time."""

Ready = tuple[Task, Chunk | None, tuple[Tensor, ...]]
"""A piece that can be copied, in parts: from its chunk, or from pinned memory."""


class Prepared:
    """The pieces of an epoch that can be copied and are not on their way. It belongs to the feeder's lock.

    What lies in pinned memory needs no chunk, so no chunk bounds how far ahead readers pass it on, and passes
    may have no end: `full` does. That adds no deadlock. The earliest piece that is not sent is here, or being
    read, or nobody has taken it yet; then everything that was taken is sent, and there is room for it.
    """

    def __init__(self) -> None:
        self._ready: dict[int, Ready] = {}
        self._pinned = 0  # of these, in pinned memory

    @property
    def full(self) -> bool:
        """Whether nothing more in pinned memory is to be passed on now."""
        return self._pinned >= AHEAD

    def put(self, task: Task, chunk: Chunk | None, parts: tuple[Tensor, ...]) -> None:
        """A piece is ready: in `chunk`, or in pinned memory."""
        self._ready[task.number] = task, chunk, parts
        self._pinned += chunk is None

    def first(self, epoch: Epoch) -> Task | None:
        """What is to be copied next, if it is ready."""
        found = self._ready.get(epoch.copied)
        return None if found is None else found[0]

    def take(self, epoch: Epoch) -> list[Ready]:
        """What is to be copied next: one piece from a chunk, or of a visit all that is ready and pinned.

        All at once, since each round of the copier wakes the other threads, which takes longer than to
        enqueue a copy; one from a chunk, since somebody may wait for the chunk.
        """
        batch = [self._ready.pop(epoch.copied)]
        epoch.copied += 1
        visit, chunk = batch[0][0].visit, batch[0][1]
        while chunk is None:
            self._pinned -= 1
            task, chunk, _ = self._ready.get(epoch.copied) or (None, None, ())
            if task is None or chunk is not None or task.visit is not visit:
                break
            batch.append(self._ready.pop(epoch.copied))
            epoch.copied += 1
        return batch

    def drop(self, ring: Ring) -> None:
        """Forget them all; their chunks are the ring's again."""
        for _, chunk, _ in self._ready.values():
            if chunk is not None:
                ring.release(chunk)
        self._ready.clear()
        self._pinned = 0
