"""What a run really took: seconds and peaks of memory, phase by phase.

The operating system keeps the peak of a process for its whole life, so a phase's host peak is "the peak up
to its end"; torch's peaks are set back when a phase begins. torch is imported only for a CUDA device.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STATUS = Path("/proc/self/status")


def host_peak() -> int:
    """The most memory that this process has had resident so far, bytes.

    VmHWM where there is /proc; else ru_maxrss, which a process inherits from the one that started it.
    """
    peak, resident = _status("VmHWM"), _status("VmRSS")
    if peak is not None and resident is not None:
        return max(peak, resident)  # the kernel brings the peak up to date with a little delay
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def host_resident() -> int:
    """The memory that this process has resident now, bytes, mapped files included; the peak without /proc."""
    resident = _status("VmRSS")
    return host_peak() if resident is None else resident


def host_anonymous() -> int:
    """The resident memory that is the process's own, bytes: without the mapped files, which cost nobody."""
    anonymous = _status("RssAnon")
    return host_resident() if anonymous is None else anonymous


def _status(field_name: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file or field."""
    if not STATUS.exists():
        return None
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field_name:
            return int(value.split()[0]) * 1024
    return None


@dataclass(frozen=True)
class PhasePeaks:
    """One phase: seconds, and bytes. The device's are 0 on the CPU."""

    name: str
    seconds: float
    host_peak: int  # of the process, from its start to the end of this phase
    host_resident: int  # at the end of this phase
    device_allocated: int = 0  # peak of torch's tensors within this phase
    device_reserved: int = 0  # peak of what torch took from the driver within this phase


@dataclass
class PhaseMeter:
    """Records phases of a run on `device` (`cpu` or `cuda:N`).

        meter = PhaseMeter("cuda:0")
        with meter.phase("denoise"):
            ...
        meter.phases[-1].seconds

    A phase that raises is recorded too. A name that comes again is another record; `total` sums up.
    """

    device: str = "cpu"
    phases: list[PhasePeaks] = field(default_factory=list)
    _open: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside. Phases do not nest: the peaks of the outer one would be lost."""
        if self._open is not None:
            raise RuntimeError(f"phase {name!r} begins inside phase {self._open!r}; expected it to end first")
        self._open = name
        self._begin()
        start = time.perf_counter()
        completed = False
        try:
            yield
            completed = True
        finally:
            allocated, reserved = self._end(completed)
            seconds = time.perf_counter() - start
            self._open = None
            self.phases.append(PhasePeaks(name, seconds, host_peak(), host_resident(), allocated, reserved))

    @property
    def total(self) -> PhasePeaks:
        """All phases as one: summed seconds, greatest peaks."""
        return PhasePeaks(
            "total",
            sum(phase.seconds for phase in self.phases),
            max((phase.host_peak for phase in self.phases), default=host_peak()),
            self.phases[-1].host_resident if self.phases else host_resident(),
            max((phase.device_allocated for phase in self.phases), default=0),
            max((phase.device_reserved for phase in self.phases), default=0),
        )

    def _begin(self) -> None:
        if not self.device.startswith("cuda"):
            return
        import torch

        torch.cuda.synchronize(self.device)  # what the phase before still computes is its own
        torch.cuda.reset_peak_memory_stats(self.device)

    def _end(self, completed: bool) -> tuple[int, int]:
        """Peaks (allocated, reserved) since `_begin`, once the device has finished what was asked of it."""
        if not self.device.startswith("cuda"):
            return 0, 0
        import torch

        if completed:  # after a fault of the device this would raise in the place of the fault
            torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
