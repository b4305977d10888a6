"""What this machine has for a run: GPU memory that is free, host memory, what can be pinned, and the disk.

Found, not assumed: limits of containers are read, pinning and reading are tried (`runtime.memory.ram`,
`.pinning` and `.disk` say how). The plan and `t2v doctor` go by it. No torch here.
"""

from dataclasses import dataclass
from pathlib import Path

from runtime.device import Gpu
from runtime.memory.disk import DiskSpeed
from runtime.memory.disk import probe_disk as measure_disk
from runtime.memory.pinning import WANT, Pinnable
from runtime.memory.pinning import probe_pinning as try_pinning
from runtime.memory.ram import cpu_cores, host_ram, is_wsl

_PIN_SHARE = 4  # of the available memory at most this part is pinned for a try


@dataclass(frozen=True)
class Machine:
    """Findings; bytes and bytes/s.

    vram_free: as of the question, 0 without a GPU. ram_total: the machine's or its tightest limit.
    ram_available: what can still be taken, so a process that has grown already may have in all what it holds
    plus this. ram_source: who says so: "host", "cgroup v1 /path", "cgroup v2 /path", "WSL2". pinnable: None
    if it was not tried, pin_error why not (more). disk: None if not measured, disk_source how or why not.
    """

    gpu: Gpu | None
    vram_free: int
    ram_total: int
    ram_available: int
    ram_source: str
    pinnable: int | None
    pin_error: str | None
    disk: float | None
    disk_source: str
    wsl: bool
    cpu_cores: int


def look(
    weights: Path | None,
    gpu: Gpu | None,
    *,
    probe_pinning: bool = True,
    probe_disk: bool = True,
    pin_want: int = WANT,
) -> Machine:
    """Look at this machine; never raises, and what could not be found out says why.

    weights: the directory (or file) whose disk is measured, for half a second; None for none. gpu: the card
    that will be used. probe_pinning starts CUDA's context and pins up to `pin_want` bytes for a moment. Both
    probes can be left out; the rest takes a few milliseconds.
    """
    ram = host_ram()
    pinnable = Pinnable(None, "not tried: there is no GPU to copy to")
    if gpu is not None and probe_pinning:
        pinnable = try_pinning(min(pin_want, ram.available // _PIN_SHARE), gpu.index)
    elif gpu is not None:
        pinnable = Pinnable(None, "not tried")
    disk = DiskSpeed(None, "not measured")
    if weights is not None and probe_disk:
        disk = measure_disk(weights)
    return Machine(
        gpu=gpu,
        vram_free=0 if gpu is None else gpu.free,
        ram_total=ram.total,
        ram_available=ram.available,
        ram_source=ram.source,
        pinnable=pinnable.bytes,
        pin_error=pinnable.error,
        disk=disk.speed,
        disk_source=disk.source,
        wsl=is_wsl(),
        cpu_cores=cpu_cores(),
    )
