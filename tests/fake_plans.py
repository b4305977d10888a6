"""A machine for plans, made up: what `runtime.memory.machine.look` would have found."""

from runtime.device import Gpu
from runtime.memory.machine import Machine

GIB = 2**30


def computer(
    *,
    vram_free: int | None = None,
    ram_available: int = 14 * GIB,
    pinnable: int | None = 512 * 2**20,
    disk: float | None = None,
    name: str = "NVIDIA GeForce RTX 4070",
    capability: tuple[int, int] = (8, 9),
) -> Machine:
    """One with `ram_available` bytes of RAM to take and, unless `vram_free` is None, a GPU of 12 GiB."""
    gpu = None
    if vram_free is not None:
        gpu = Gpu(0, name, "GPU-0", max(12 * GIB, vram_free), vram_free, capability, "580.1")
    return Machine(
        gpu=gpu,
        vram_free=vram_free or 0,
        ram_total=ram_available + 2 * GIB,
        ram_available=ram_available,
        ram_source="host",
        pinnable=None if gpu is None else pinnable,
        pin_error=None
        if gpu is not None and pinnable is not None
        else "not tried: there is no GPU to copy to",
        disk=disk,
        disk_source="made up" if disk is not None else "not measured",
        wsl=False,
        cpu_cores=8,
    )
