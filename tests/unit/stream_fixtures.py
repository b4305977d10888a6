"""What the tests of streaming share: files of weights, models around them, and a disk that misbehaves."""

import ctypes
import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.checkpoint import Checkpoint, load_weights, open_checkpoint
from runtime.checkpoint.convert import Recipe, write_layout
from runtime.checkpoint.names import Kind
from runtime.linear import swap_linears
from runtime.memory.load import load_streamed
from runtime.memory.ring import Ring
from runtime.memory.source import PAGE, System, WeightFiles
from runtime.memory.stream import BlockStream
from runtime.transformer import Transformer
from tests.unit.checkpoint_fixtures import TEXT_ENCODER, TRANSFORMER, on_meta, tensors_of

CHUNK = 4 * PAGE
FP32 = {"transformer": Transformer.FP32_PARAMETERS, "text_encoder": ()}


@dataclass(frozen=True)
class Placed:
    """A placement as the plan states it."""

    resident: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()
    slots: int = 2


def written(root: Path, kind: Kind, form: str, layout: Any, seed: int = 1) -> Checkpoint:
    """A tiny random checkpoint in a layout, opened; `form` of its matrices, everything else is bf16."""
    name = {"blocks": "model", "single": "model.safetensors", "pickle": "model_t5.pth"}[layout]
    write_layout(root / name, tensors_of(kind, seed), Recipe(kind, form), layout)  # type: ignore[arg-type]
    return open_checkpoint(root / name, kind)


def bare(checkpoint: Checkpoint) -> nn.Module:
    """Its model on meta, ready to be filled."""
    model = on_meta(checkpoint.kind)
    swap_linears(model, checkpoint.quantized_linears())
    return model


def resident(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The slow twin: everything loaded."""
    model = bare(checkpoint)
    load_weights(model, checkpoint, dtype=dtype, device="cpu", fp32_parameters=FP32[checkpoint.kind])
    return model


@contextmanager
def streamed(
    checkpoint: Checkpoint,
    placement: Placed | None = None,
    *,
    chunk: int = CHUNK,
    chunks: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    system: System | None = None,
    ring: Ring | None = None,
    **options: Any,
) -> Iterator[tuple[nn.Module, BlockStream]]:
    """The same model with its blocks placed; its threads must be gone when the block ends."""
    model = bare(checkpoint)
    own = ring or Ring(chunk, chunks, pinned=False)
    stream = load_streamed(
        model,
        checkpoint,
        placement=placement or Placed(),
        ring=own,
        dtype=dtype,
        device="cpu",
        fp32_parameters=FP32[checkpoint.kind],
        files=WeightFiles(system),
        **options,
    )
    threads = threads_of(stream)
    try:
        yield model, stream
    finally:
        threads |= threads_of(stream)
        stream.close()
        if ring is None:
            own.close()
        assert not any(thread.is_alive() for thread in threads)


def threads_of(stream: BlockStream) -> set[threading.Thread]:
    return set(stream._feeder._threads)


def inputs_of(kind: str, seed: int = 3) -> tuple[Tensor, ...]:
    """Fresh random inputs of the tiny model of a kind."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "transformer":
        states = torch.randn(1, TRANSFORMER.text_len, TRANSFORMER.text_dim, generator=generator)
        time_ = torch.rand(1, generator=generator) * 1000
        return torch.randn(1, 16, 2, 4, 6, generator=generator), time_, states
    ids = torch.randint(0, TEXT_ENCODER.vocab_size, (2, 7), generator=generator)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference of two results; 0 means equal, bit for bit."""
    assert one.dtype == other.dtype and one.shape == other.shape
    same = torch.equal(one, other)
    return 0.0 if same else max(float((one.double() - other.double()).abs().max()), 1e-300)


class Faults(System):
    """Reads that are short, slow or fail. Everything goes past the page cache or through it as it is told.

    cached, direct: whether those ways exist. delay: seconds of each read. fail_after: reads that still work.
    """

    def __init__(
        self,
        *,
        cached: bool = False,
        direct: bool = True,
        short: int | None = None,
        delay: float = 0.0,
        fail_after: int | None = None,
        error: int = errno.EIO,
    ) -> None:
        self.cached, self.with_direct, self.short = cached, direct, short
        self.delay, self.fail_after, self.error = delay, fail_after, error
        self.reads = 0
        self.open_files = 0
        self.slept = threading.Event()
        self._lock = threading.Lock()
        self._random = random.Random(5)

    def open(self, path: Path, direct: bool) -> int:
        if direct and not self.with_direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        fd = super().open(path, direct)
        with self._lock:
            self.open_files += 1
        return fd

    def close(self, fd: int) -> None:
        super().close(fd)
        with self._lock:
            self.open_files -= 1

    def read(self, fd: int, target: memoryview, offset: int) -> int:
        with self._lock:
            self.reads += 1
            failing = self.fail_after is not None and self.reads > self.fail_after
            size = len(target)
            if self.short is not None:  # O_DIRECT reads are short by whole pages
                size = min(size, self._random.randint(1, self.short) * PAGE)
        if self.delay:
            self.slept.set()
            time.sleep(self.delay)
        if failing:
            raise OSError(self.error, os.strerror(self.error))
        return super().read(fd, target[:size], offset)

    def read_cached(self, fd: int, target: memoryview, offset: int) -> int:
        if not self.cached:
            raise BlockingIOError(errno.EAGAIN, "not in the cache")
        return super().read_cached(fd, target, offset)


@dataclass
class FakeStream:
    """A GPU's stream: work that runs in order, some time after it was handed over."""

    jitter: float
    seed: int
    work: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._running = self._ended = False
        self._random = random.Random(self.seed)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Any) -> None:
        with self._changed:
            self.work.append(work)
            self._changed.notify_all()

    def drain(self) -> None:
        with self._changed:
            while self.work or self._running:
                self._changed.wait()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self.work and not self._ended:
                    self._changed.wait()
                if not self.work:
                    return
                work, self._running = self.work.pop(0), True
            time.sleep(self._random.random() * self.jitter)
            work()
            with self._changed:
                self._running = False
                self._changed.notify_all()


class FakeEvent:
    """Recorded on a FakeStream: happens when the stream comes to it."""

    def __init__(self, stream: FakeStream) -> None:
        self._happened = threading.Event()
        stream.put(self._happened.set)

    def query(self) -> bool:
        return self._happened.is_set()

    def wait(self) -> None:
        assert self._happened.wait(20), "an event that never happens: a deadlock of the two streams"


class FakeLane:
    """A lane with two streams as a GPU has them: copies and computation are only enqueued, in both orders."""

    def __init__(self, copy_jitter: float, compute_jitter: float, seed: int) -> None:
        self.side = FakeStream(copy_jitter, seed)
        self.compute = FakeStream(compute_jitter, seed + 1)

    def enter(self) -> None: ...

    def begin(self) -> None: ...

    def allocate(self, nbytes: int) -> tuple[Tensor, Any]:
        return torch.empty(nbytes, dtype=torch.uint8), self.after_compute()

    def copy(self, target: Tensor, source: Tensor, after: Any, trace: Any) -> tuple[Any, None]:
        if after is not None:
            self.side.put(after.wait)
        to, of = target.numpy(), source.numpy()
        self.side.put(lambda: to.__setitem__(slice(None), of))
        return FakeEvent(self.side), None

    def before_compute(self, copied: Any) -> None:
        self.compute.put(copied.wait)

    def after_compute(self) -> Any:
        return FakeEvent(self.compute)

    def settle(self) -> None:
        self.side.drain()

    def end(self) -> None:
        self.side.end()
        self.compute.end()


class Driver:
    """libcuda, that pins `limit` bytes and no more; each call takes `seconds`, `calls` counts them."""

    def __init__(self, limit: int = 2**40, seconds: float = 0.0) -> None:
        self.limit, self.seconds = limit, seconds
        self.calls = self.given_back = 0
        self.pinned: dict[int, int] = {}  # address -> bytes
        self.lock = threading.Lock()

    def cuMemHostRegister_v2(self, address: Any, nbytes: Any, flags: int) -> int:
        assert address.value % PAGE == 0 and nbytes.value % PAGE == 0 and nbytes.value > 0 and flags == 1
        time.sleep(self.seconds)
        with self.lock:
            self.calls += 1
            if sum(self.pinned.values()) + nbytes.value > self.limit:
                return 2  # CUDA_ERROR_OUT_OF_MEMORY
            for begin, size in self.pinned.items():  # the real one refuses what overlaps
                assert address.value + nbytes.value <= begin or begin + size <= address.value
            self.pinned[address.value] = nbytes.value
            return 0

    def cuMemHostUnregister(self, address: Any) -> int:
        with self.lock:
            del self.pinned[address.value]
            self.given_back += 1
            return 0

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether these bytes are pinned, by one call."""
        with self.lock:
            return any(begin <= address and address + nbytes <= begin + n for begin, n in self.pinned.items())


def cached_pages(file: Path) -> int:
    """Pages of `file` in the page cache."""
    size = file.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    found = (ctypes.c_ubyte * -(-size // PAGE))()
    if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in found)


def drop_cache(file: Path) -> None:
    """Write the file out and let the page cache forget it."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
