"""Choosing by measuring: candidates are run in turn, and the fastest right one wins.

    times = time_candidates({"a": run_a, "b": run_b})        medians in ms, of those that run

Candidates are interleaved, so that a GPU that changes its clocks changes them for all; those that are far
behind after one look are not looked at again. The times come from events on the current stream.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import first_line
from runtime.kernels import configs, launch, w8a8
from runtime.kernels.configs import Config

Run = Callable[[], object]
HOPELESS = 1.5  # times the best: no repetition would make up for that


@dataclass(frozen=True)
class Timing:
    """What became of one candidate: its median in milliseconds, or why it cannot run."""

    name: str
    milliseconds: float | None
    trouble: str = ""


def milliseconds(run: Run, calls: int = 1) -> float:
    """One of `calls` runs on the current stream, by events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def in_a_row(run: Run) -> float:
    """One of three: in a model the host is ahead of the GPU, as it is for the last two of these."""
    return milliseconds(run, calls=3)


def time_candidates(
    candidates: Mapping[str, Run], repeats: int = 7, clock: Callable[[Run], float] = milliseconds
) -> list[Timing]:
    """All candidates, the fastest first, those that cannot run last.

    Each runs once untimed (that compiles it) and once timed; those within HOPELESS of the best then run
    `repeats` times more, in turn. `clock` times one run.
    """
    samples: dict[str, list[float]] = {}
    failed: list[Timing] = []
    for name, run in candidates.items():
        try:
            run()
            samples[name] = [clock(run)]
        # too much shared memory, a compiler's assertion, an unknown format: each raises something else
        except Exception as error:  # noqa: BLE001
            failed.append(Timing(name, None, f"{type(error).__name__}: {first_line(error)}"))
    best = min((times[0] for times in samples.values()), default=0.0)
    promising = [name for name, times in samples.items() if times[0] <= HOPELESS * best]
    for _ in range(repeats):
        for name in promising:
            samples[name].append(clock(candidates[name]))
    ranked = sorted((statistics.median(times), name) for name, times in samples.items())
    return [*(Timing(name, median) for median, name in ranked), *failed]


def tune_w8a8(
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    device: torch.device,
    fast: bool = False,
    clock: Callable[[Run], float] = milliseconds,
) -> list[tuple[Config, Timing]]:
    """Time the 8-bit product of q (rows, depth) and w (columns, depth) in every config of this GPU.

    Returns the configs with their timings, the fastest first; one whose numbers are wrong counts as unable
    to run. Sets nothing: give the first to `configs.use`. Inputs are random, as zeros would run faster.
    `clock` times one run.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, w = (_random(shape, dtype, generator) for shape in ((rows, depth), (columns, depth)))
    s_a, s_w = (
        torch.rand(count, 1, device=device, generator=generator).add_(0.5).mul_(depth**-0.5)
        for count in (rows, columns)
    )
    bias = torch.randn(columns, device=device, generator=generator)
    some = torch.arange(0, rows, max(rows // 61, 1), device=device)
    expected = w8a8.w8a8_torch(picked(q, some), w, s_a[some], s_w, bias, torch.float32)

    def run(config: Config) -> Tensor:
        return w8a8.w8a8_triton(q, w, s_a, s_w, bias, torch.bfloat16, False, fast, config)

    def checked(config: Config) -> Run:
        seen = False

        def once() -> Tensor:
            nonlocal seen
            y = run(config)
            if not seen:
                seen = True
                _must_agree(y[some], expected)
            return y

        return once

    found = configs.candidates(torch.cuda.get_device_capability(device), dtype, launch.HAS_DESCRIPTORS)
    by_name = {str(config): config for config in found}
    timings = time_candidates({name: checked(config) for name, config in by_name.items()}, clock=clock)
    return [(by_name[timing.name], timing) for timing in timings]


def picked(q: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a tensor of 8-bit numbers; as bytes, since older torch cannot index fp8."""
    return q.view(torch.uint8)[rows].view(q.dtype)


def _random(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers as quantized rows hold them: a Gaussian whose largest of a row is near the format's largest."""
    spread = 30.0 if dtype == torch.int8 else 110.0
    x = torch.randn(shape, device=generator.device, generator=generator).mul_(spread)
    return x.round_().clamp_(-127, 127).to(dtype) if dtype == torch.int8 else x.clamp_(-448, 448).to(dtype)


def _must_agree(y: Tensor, expected: Tensor) -> None:
    """Raise ArithmeticError where y (bf16) is not `expected` (fp32) but for its rounding and fp8's sums."""
    error = float((y.float() - expected).norm() / expected.norm())
    if not error < 6e-3:  # bf16 alone gives 1.7e-3, Hopper's fast fp8 sums 2.8e-3; NaN is no agreement
        raise ArithmeticError(f"wrong numbers: relative difference {error:.1e}")
