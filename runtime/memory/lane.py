"""How bytes get to the device, and how copies and computation wait for each other.

On a GPU: copies run on one side stream, the computation on the stream that is current in the main thread (the
default one: some attention kernels launch nowhere else), and each waits for events of the other, never the
host for either. On the CPU a copy is done when it returns, and there is nothing to wait for.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.memory.trace import Mark, Trace

Copied = tuple[Any, tuple[Mark, Mark] | None]
"""The event after a copy, and when it began and ended if that is recorded."""


class Lane(Protocol):
    """The way to one device."""

    def enter(self) -> None:
        """Called once by each thread that may copy."""

    def begin(self) -> None:
        """The calling thread is going to compute, on its current stream."""

    def allocate(self, nbytes: int) -> tuple[Tensor, Any]:
        """A buffer (nbytes,) uint8 on the device and the event from which on it may be written."""

    def copy(self, target: Tensor, source: Tensor, after: Any, trace: Trace | None) -> Copied:
        """Copy source (n,) to target (n,) once event `after` has happened."""

    def before_compute(self, copied: Any) -> None:
        """What the main thread computes next waits for the event of a copy."""

    def after_compute(self) -> Any:
        """The event after all that the main thread has computed so far."""

    def settle(self) -> None:
        """Wait on the host until every copy is done."""


class CpuLane:
    """The device is the CPU: its buffers are memory, its copies are done when they return."""

    def enter(self) -> None:
        """Nothing to prepare."""

    def begin(self) -> None:
        """There are no streams."""

    def allocate(self, nbytes: int) -> tuple[Tensor, Any]:
        """Ordinary memory, ready at once."""
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8), None

    def copy(self, target: Tensor, source: Tensor, after: Any, trace: Trace | None) -> Copied:
        """Done when it returns."""
        begin = trace.mark_host() if trace is not None else None
        np.copyto(target.numpy(), source.numpy())
        return None, None if trace is None or begin is None else (begin, trace.mark_host())

    def before_compute(self, copied: Any) -> None:
        """The copy is done already."""

    def after_compute(self) -> Any:
        """The computation is done already."""
        return None

    def settle(self) -> None:
        """Nothing is under way."""


class CudaLane:
    """A GPU: one side stream for copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)
        self._compute = torch.cuda.current_stream(device)

    def enter(self) -> None:
        """The current device belongs to a thread."""
        torch.cuda.set_device(self.device)

    def begin(self) -> None:
        """Remembered, because events are recorded from other threads too."""
        self._compute = torch.cuda.current_stream(self.device)

    def allocate(self, nbytes: int) -> tuple[Tensor, Any]:
        """Memory of torch's allocator. What used it before may still run on the main thread's stream."""
        with torch.inference_mode(False):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return buffer, self.after_compute()

    def copy(self, target: Tensor, source: Tensor, after: Any, trace: Trace | None) -> Copied:
        """Enqueued, not done, when it returns; with pinned memory the host does not wait."""
        with torch.cuda.stream(self.side):
            if after is not None:
                self.side.wait_event(after)
            begin = trace.mark_device(self.side) if trace is not None else None
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.side)
            if trace is None or begin is None:
                return done, None
            return done, (begin, trace.mark_device(self.side))

    def before_compute(self, copied: Any) -> None:
        """An order between streams; the host goes on."""
        self._compute.wait_event(copied)

    def after_compute(self) -> Any:
        """Recorded on the stream of the computation."""
        event = torch.cuda.Event()
        event.record(self._compute)
        return event

    def settle(self) -> None:
        """For changes of the placement and the end alone."""
        self.side.synchronize()


def lane_to(device: torch.device) -> Lane:
    """The lane for `device`: CUDA or the CPU."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return CudaLane(torch.device("cuda", index))
    return CpuLane()
