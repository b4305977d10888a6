"""Peak memory of each phase: of the process (from /proc) and of the GPU (from torch's allocator)."""

import sys
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to clear_refs, sets the high-water mark back to the resident size (Linux 4.0)


@dataclass(frozen=True)
class Peak:
    """Bytes at the highest point of a phase; None where this machine cannot tell, or has no GPU."""

    ram: int | None
    vram: int | None


class Meter:
    """Measures one phase after the other: `lap` ends one and begins the next."""

    def __init__(self) -> None:
        self._ram = _reset_ram_peak()
        _reset_vram_peak()

    def lap(self) -> Peak:
        """The peaks since the last lap."""
        peak = Peak(_ram_peak() if self._ram else None, _vram_peak())
        self._ram = _reset_ram_peak()
        _reset_vram_peak()
        return peak


def _reset_ram_peak() -> bool:
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # not Linux, or a sandbox without it: then nothing is reported rather than a wrong number
        return False
    return True


def _ram_peak() -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _reset_vram_peak() -> None:
    torch = sys.modules.get("torch")  # loaded by then if anything runs on a GPU
    if torch is not None and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _vram_peak() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
