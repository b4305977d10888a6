"""Timing: in one process, after a warm-up, interleaved; medians are `Sample`'s.

Interleaved, because a card at its power limit changes its clocks: then it changes them for all alike.
"""

import time
from collections.abc import Callable, Mapping

import torch

from runtime.bench.samples import Sample

Run = Callable[[], object]
LONG = 0.01  # seconds, beside which a launch is nothing
IN_A_ROW = 5


def wait(device: torch.device) -> None:
    """Until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall(run: Run, device: torch.device) -> float:
    """Seconds of `run` by the clock on the wall, the device's work included."""
    wait(device)
    began = time.perf_counter()
    with torch.inference_mode():
        run()
    wait(device)
    return time.perf_counter() - began


def on_device(run: Run, device: torch.device) -> float:
    """Seconds between two events around `run` on the device's stream; on the CPU those of `wall`."""
    if device.type != "cuda":
        return wall(run, device)
    with torch.cuda.device(device), torch.inference_mode():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def queued(run: Run, device: torch.device) -> float:
    """Seconds of `run` in a queue of its like, as in a model, where the host is ahead of the GPU.

    A short one alone takes as long as the host takes to launch it: 1,900 products of 0.3 ms seemed a third
    longer than they are. A long one is timed once, as by `on_device`.
    """
    alone = on_device(run, device)
    if device.type != "cuda" or alone >= LONG:
        return alone
    with torch.cuda.device(device), torch.inference_mode():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()  # while this one runs the next ones are launched
        start.record()
        for _ in range(IN_A_ROW):
            run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3 / IN_A_ROW


def interleaved(
    runs: Mapping[str, Run],
    repeats: int,
    device: torch.device,
    clock: Callable[[Run, torch.device], float] = wall,
    warm: int = 1,
) -> dict[str, Sample]:
    """Seconds of each of `runs`: all untimed `warm` times, then `repeats` rounds of all in turn."""
    for _ in range(warm):
        for run in runs.values():
            clock(run, device)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(clock(run, device))
    return {name: Sample(tuple(values)) for name, values in found.items()}
