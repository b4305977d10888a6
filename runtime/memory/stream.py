"""Blocks whose matrices come to the device when they are needed: one model, more weights than memory.

    stream = load_streamed(model, checkpoint, placement=plan.blocks, ...)      # `load.py`
    stream.expect(passes=4)
    ... model(...) ...                     # `for block in self.blocks` does the rest
    stream.close()

A block is resident (its matrices have their own buffer on the device), cached (in memory, copied at every
pass; straight from there once it is pinned) or stored (read from its file at every pass). The small tensors
of all blocks are on the device for good. Iterating binds the matrices of a block to views of a buffer, lets
the computation wait for the event of their copies, and afterwards gives the buffer to the block after next,
which is on its way while this one computes. The same bytes reach the same kernels wherever a block lives, so
the results are equal bit for bit.
"""

import os
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from runtime.memory.cached import Pinner
from runtime.memory.feeder import Feeder
from runtime.memory.lane import lane_to
from runtime.memory.ram import is_wsl
from runtime.memory.ring import Ring
from runtime.memory.source import ReadCounts
from runtime.memory.stored import PieceReader, StoredBlock, matrix_modules
from runtime.memory.trace import Trace
from runtime.memory.visits import Home

READERS = min(8, max(3, (os.cpu_count() or 1) // 2))
"""Threads that read: enough for a disk's queue, and for copying from RAM as fast as the bus takes it. Three
copied 18 GB/s on the H200's host, whose bus takes 55."""

OnBytes = Callable[[int], None]


class Placement(Protocol):
    """Where the blocks are: those that are neither resident nor cached are stored."""

    @property
    def resident(self) -> Sequence[int]:
        """Indices of the blocks that stay on the device."""

    @property
    def cached(self) -> Sequence[int]:
        """Indices of the blocks that stay in memory."""

    @property
    def slots(self) -> int:
        """Buffers on the device that the others take in turn."""


@dataclass(frozen=True)
class StreamCounts:
    """What a stream has done so far."""

    reads: ReadCounts  # from the files
    cache_bytes: int  # from the blocks that are cached
    copied_bytes: int  # to the device
    waits: int  # times that the main thread had to wait until a block was on its way
    wait_seconds: float


class BlockStream(nn.ModuleList):
    """The blocks of a model, in the place of its ModuleList. Use it as a context, or `close` it.

    blocks: with their small tensors on the device; `stored` says where the matrices of each are. They cease
    to be parameters or buffers: `state_dict` and `to` do not know them. One iteration at a time: a second
    one ends the first. Raises WeightsError for files that are gone, at once, or that fail, at the next
    block.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        stored: Sequence[StoredBlock],
        reader: PieceReader,
        placement: Placement,
        ring: Ring,
        device: torch.device | str,
        readers: int = READERS,
    ) -> None:
        super().__init__(blocks)
        self._stored = tuple(stored)
        self._modules_of = [list(matrix_modules(block).values()) for block in blocks]
        self._reader = reader
        self._device = torch.device(device)
        lane = lane_to(self._device)
        self._feeder = Feeder(self._stored, reader, ring, lane, readers)
        self._pinner = Pinner(lane, ring.driver)
        self._bound: set[int] = set()
        self._left_out: frozenset[str] = frozenset()
        self._parked = True  # nothing on the device yet
        self._placement = _checked(placement.resident, placement.cached, placement.slots, len(self._stored))
        take_out(blocks)
        reader.open(range(len(self._stored)))
        # Also when the model is dropped without `close`: threads and pinned memory would outlive it.
        self._finalizer = weakref.finalize(self, _end, self._feeder, self._pinner)
        self._closed = False
        self._settle_in()

    @property
    def trace(self) -> Trace | None:
        """Set it to record what happens from the next block on; None, as it is at first, costs nothing."""
        return self._feeder.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._feeder.trace = trace

    @property
    def counts(self) -> StreamCounts:
        """What was read, copied and waited for."""
        feeder, reader = self._feeder, self._reader
        return StreamCounts(
            reader.files.counts, reader.cache_bytes, feeder.copied_bytes, feeder.waits, feeder.wait_seconds
        )

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers on the device: resident blocks and slots."""
        return sum(home.buffer.nbytes for home in (*self._feeder.residents.values(), *self._feeder.slots))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the blocks that are kept in memory, once all are read."""
        return sum(cached.nbytes for cached in self._reader.cached.values())

    @property
    def pinned_bytes(self) -> int:
        """Bytes of these that are pinned by now, so that the GPU fetches them from there (`pin_cached`)."""
        return sum(cached.nbytes for cached in self._reader.cached.values() if cached.pinned)

    @property
    def pin_refusal(self) -> str:
        """Why cached blocks stay ordinary memory, as far as they do; empty if nothing is known against it."""
        return "under WSL little can be pinned" if is_wsl() else self._pinner.refusal

    def __iter__(self) -> Iterator[nn.Module]:
        """One pass: each block in order, its matrices there until the next is asked for."""
        self._unpark()
        feeder = self._feeder
        epoch = feeder.begin()
        for index in self._bound - feeder.residents.keys():  # of an iteration that was overtaken
            self._unbind(index)
        for index, block in enumerate(list(self._modules.values())):
            # No name for the buffer here: an error in a block keeps this frame while a leaner plan is tried.
            self._bind(index, feeder.take(epoch, index))
            trace = feeder.trace
            begin = trace.mark_device() if trace is not None else None
            try:
                yield cast(nn.Module, block)
            finally:
                if trace is not None and begin is not None:
                    trace.add("compute", str(index), begin, trace.mark_device())
                if feeder.epoch is epoch:
                    if index not in feeder.residents:
                        self._unbind(index)
                    feeder.release(epoch, index)

    def expect(self, passes: int | None) -> None:
        """`passes` more passes are to come, and no others are fetched for. None, as at first: no end."""
        self._feeder.expect(passes)

    def leave_out(self, modules: Collection[str], after: int = 0) -> None:
        """After `after` more passes, bring blocks that stream without the matrices of some modules.

        modules: names within each block; none: bring everything, as at first. What is left out is absent in
        its pass (to compute with it is an error) and neither read, nor cached, nor copied. Between passes, or
        after one that failed. Raises ValueError where that leaves a block no matrices.
        """
        self._feeder.leave_out(modules, after)
        self._left_out = frozenset(modules)

    def pin_cached(self, wait: bool = False) -> None:
        """Have the cached blocks that are complete pinned where they lie: in the background, or `wait`.

        Never raises: what cannot be pinned goes on through the ring. Nothing happens where the ring is not
        pinned, as on the CPU, and under WSL, where torch needs the little that can be.
        """
        if self._closed or self.pin_refusal:
            return
        self._pinner.ask(self._reader.cached.values())
        if wait:
            self._pinner.wait()

    def start(self) -> None:
        """Begin to fetch now, before the first pass."""
        self._unpark()
        self._feeder.start()

    def load_residents(self, on_bytes: OnBytes | None = None) -> None:
        """Wait for the resident blocks; else each comes in its turn during the first pass.

        on_bytes(n) is called after each block with its bytes in the file.
        """
        self._unpark()
        self._feeder.load_residents(on_bytes)

    def resize(self, resident: Sequence[int], cached: Sequence[int], slots: int) -> None:
        """Another placement, leaner or richer; between passes, or after one that failed.

        What is no longer placed is freed before anything new is allocated, so a leaner plan never needs
        more than the one before. When an allocation fails, nothing is left on the device, and the error is
        torch's. While the stream is parked it stays so: something else has the device, and the next pass
        allocates.
        """
        self._placement = _checked(resident, cached, slots, len(self._stored))
        if self._parked and not self._closed:
            self._place({}, [], self._placement[1])
        else:
            self._settle_in()

    def park(self) -> None:
        """Free everything on the device but the small tensors; the next pass brings it back."""
        self._place({}, [])
        self._parked = True

    def close(self) -> None:
        """Stop the threads, wait for copies, free the buffers and close the files; idempotent.

        Takes a second or two at most, whatever the disk does, and the time of what the GPU still has to
        compute and of unpinning. A thread that hangs in a read ends with it, keeping no more than its chunk.
        """
        self._closed = True
        self._unbind_all()
        if _end(self._feeder, self._pinner):
            self._finalizer.detach()
        self._give_back()

    def __enter__(self) -> "BlockStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settle_in(self) -> None:
        """Make the buffers be those of the placement."""
        if self._closed:
            raise RuntimeError("this stream of blocks is closed")
        resident, cached, slots = self._placement
        feeder, count = self._feeder, len(self._stored)
        size = max((self._stored[i].nbytes for i in range(count) if i not in resident), default=0)
        homes = {i: home for i, home in feeder.residents.items() if i in resident}
        buffers = [home for home in feeder.slots if home.buffer.nbytes == size][:slots]
        self._place(dict(homes), list(buffers), cached)
        try:
            for index in resident - homes.keys():
                homes[index] = self._home(self._stored[index].nbytes)
            while len(buffers) < slots:
                buffers.append(self._home(size))
        except BaseException:
            # Emptied, not only left: a caught error keeps this frame, and the memory, until it is let go.
            homes.clear()
            buffers.clear()
            self.park()
            raise
        # in the order of the blocks, in which they are loaded
        feeder.place({index: homes[index] for index in sorted(homes)}, buffers)
        self._parked = False

    def _place(
        self, residents: dict[int, Home], slots: list[Home], cached: Sequence[int] | None = None
    ) -> None:
        """Keep these buffers alone, and of the cached blocks these, if any are named."""
        self._unbind_all()
        self._feeder.place(residents, slots, cached)
        self._give_back()

    def _home(self, nbytes: int) -> Home:
        buffer, free = self._feeder.lane.allocate(nbytes)
        return Home(buffer, free)

    def _unpark(self) -> None:
        if self._parked:
            self._settle_in()

    def _give_back(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _bind(self, index: int, home: Home) -> None:
        """Let the modules of a block find their matrices, those that are there."""
        if index in self._bound:
            return
        left_out = self._left_out if home.lean else ()
        stored = self._stored[index]
        views = home.views.get(stored.layout)
        if views is None:
            views = home.views[stored.layout] = stored.views(home.buffer)
        for module, view, matrix in zip(self._modules_of[index], views, stored.matrices, strict=True):
            if matrix.owner not in left_out:
                module.__dict__["weight"] = view
        self._bound.add(index)

    def _unbind(self, index: int) -> None:
        """Let go of the views."""
        for module, matrix in zip(self._modules_of[index], self._stored[index].matrices, strict=True):
            module.__dict__["weight"] = _absent(matrix.dtype)
        self._bound.discard(index)

    def _unbind_all(self) -> None:
        for index in list(self._bound):
            self._unbind(index)


def take_out(blocks: Sequence[nn.Module]) -> None:
    """Make the matrices of blocks plain attributes, absent, no parameters or buffers; idempotent."""
    for block in blocks:
        for module in matrix_modules(block).values():
            dtype = cast(Tensor, module.weight).dtype
            module._parameters.pop("weight", None)
            module._buffers.pop("weight", None)
            module.__dict__["weight"] = _absent(dtype)


def _absent(dtype: torch.dtype) -> Tensor:
    """Stands for a matrix that is not there. Of no size: one on meta of the right size can pass unseen."""
    return torch.empty(0, dtype=dtype, device="meta")


def _checked(
    resident: Sequence[int], cached: Sequence[int], slots: int, count: int
) -> tuple[frozenset[int], tuple[int, ...], int]:
    """The placement, or ValueError for one that cannot be."""
    held = frozenset(resident)
    known = range(count)
    if len(held) != len(resident) or len(set(cached)) != len(cached) or held & set(cached):
        raise ValueError("a block is placed twice; expected it to be resident, cached or stored")
    if any(index not in known for index in (*resident, *cached)):
        raise ValueError(f"a block outside of 0..{count - 1} is placed")
    if slots < 0 or (slots == 0 and len(held) < count):
        raise ValueError(f"{slots} slots for {count - len(held)} blocks that stream; expected at least one")
    return held, tuple(cached), slots


def _end(feeder: Feeder, pinner: Pinner) -> bool:
    """Stop the threads, let go of the cache and close the files.

    False while a thread hangs in a read: it keeps its file open.
    """
    pinner.stop()
    ended = feeder.stop()
    feeder.reader.set_cached(())  # unpinned only now that no copy is under way
    if ended:
        feeder.reader.files.close()
    return ended
