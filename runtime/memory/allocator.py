"""torch's allocator on the GPU: it takes what was asked for, and no more than is allowed."""

import os
import sys

from runtime.memory.ram import is_wsl

SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def settle() -> None:
    """Ask for segments that grow; before CUDA starts, which reads it once. A setting of the user's stays.

    Without it memory is taken in segments of their first use, and what lies free in them between uses adds to
    the peak. Under WSL the driver does not offer what growing needs.
    """
    torch = sys.modules.get("torch")
    started = torch is not None and torch.cuda.is_initialized()
    if started or any(name in os.environ for name in SETTINGS) or is_wsl():
        return
    os.environ[SETTINGS[0]] = EXPANDABLE


def cap(device: str, nbytes: int) -> None:
    """Let torch reserve no more than `nbytes` on a GPU: more fails, where a driver might spill into RAM.

    Nothing on the CPU, or for 0.
    """
    if device == "cpu" or not nbytes:
        return
    import torch

    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
