"""Which machine, driver and versions a measurement is of."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from runtime.device import gpu_of
from runtime.kernels import launch
from runtime.memory.ram import host_ram

PACKAGES = ("triton", "sageattention", "flash-attn", "flash-attn-3", "nvidia-cudnn-frontend")
"""Whose versions decide how fast something is, where they are installed."""


def describe(device: str) -> dict[str, str]:
    """What to print at the head: card, driver, processor, memory, versions, and whether Triton works."""
    found = {"card": "none, computed on the CPU"}
    gpu = gpu_of(device)
    if gpu is not None:
        found = {"card": str(gpu), "driver": gpu.driver}
    elif device != "cpu":
        found = {"card": torch.cuda.get_device_name(device)}
    found["processor"] = f"{_processor()}, {len(os.sched_getaffinity(0))} cores"
    found["memory"] = f"{host_ram().total / 2**30:.1f} GiB"
    found["system"] = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if cudnn is not None:
        found["cudnn"] = str(cudnn)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device != "cpu":
        found["fused kernels"] = launch.trouble(torch.device(device)) or "work"
    return found


def card_name(device: str) -> str:
    """The card's name as torch has it; "" for the CPU. What targets are looked up by."""
    return "" if device == "cpu" else torch.cuda.get_device_name(device)


def _processor() -> str:
    """Its name as the kernel has it, else its architecture."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.machine()
