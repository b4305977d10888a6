"""What a run has cost so far, for the table at its end."""

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from entrypoint.events import Peak, Reporter
from runtime.memory.meter import host_peak

if TYPE_CHECKING:
    from runtime.stages import Stage


@dataclass
class Account:
    """What a run has cost so far, phase by phase, and whom to tell."""

    reporter: Reporter
    begun: float = field(default_factory=time.perf_counter)
    timings: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, Peak] = field(default_factory=dict)

    def stage(self, stage: "Stage") -> None:
        """Take note of a piece of work, and tell of it."""
        self.timings[stage.phase] = stage.seconds
        self.peaks[stage.phase] = Peak(host_peak(), _vram_peak(forget=stage.step == stage.steps))
        self.reporter.stage(stage)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.begun


def _vram_peak(*, forget: bool) -> int | None:
    """The peak since it was last forgotten, of the GPU that has the highest; None if none is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    devices = range(torch.cuda.device_count())
    peak = max(torch.cuda.max_memory_reserved(device) for device in devices)
    for device in devices if forget else ():
        torch.cuda.reset_peak_memory_stats(device)
    return peak
