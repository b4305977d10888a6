"""What both training stages share: a clock instead of a step count, Muon, averaged weights, a log."""

import copy
import math
import time
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class Clock:
    """Progress of a stage from 0 to 1, by wall clock or by a fixed number of steps (tests)."""

    def __init__(self, minutes: float, steps: int | None = None) -> None:
        self.seconds, self.steps, self.step = minutes * 60, steps, 0
        self.started = time.monotonic()

    def fraction(self) -> float:
        """How much of the budget is spent; 1 and above means stop."""
        if self.seconds <= 0:
            return 1.0
        if self.steps is not None:
            return self.step / self.steps
        return self.elapsed() / self.seconds

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


def cosine(fraction: float, floor: float = 0.02, warmup: float = 0.01) -> float:
    """Learning rate factor: a short linear rise, then a cosine from 1 down to `floor`."""
    if fraction < warmup:
        return max(fraction / warmup, 0.02)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


def orthogonalise(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Bring the singular values of a batch of matrices (N, r, c) near 1 by Newton-Schulz iterations.

    The quintic of Muon (Jordan et al. 2024): X <- aX + (bA + cA²)X with A = XXᵀ.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon:
    """Momentum whose update is orthogonalised, for the matrices of hidden layers."""

    def __init__(self, matrices: Iterable[nn.Parameter], rate: float, momentum: float = 0.95) -> None:
        self.rate, self.momentum = rate, momentum
        groups: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        # Matrices of one shape are orthogonalised together: a few large products, not hundreds of small ones.
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in groups.items()]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the rate; leaves the gradients as they are."""
        for i, (group, memory) in enumerate(self.groups):
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None]).float()
            memory = memory.to(gradient.device)
            memory.lerp_(gradient, 1 - self.momentum)
            self.groups[i] = (group, memory)
            update = orthogonalise(gradient.lerp(memory, self.momentum))
            rows, columns = update.shape[1:]
            scale = self.rate * factor * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(group, 1 - 0.01 * self.rate * factor)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-scale)


class Average(Generic[Module]):
    """Exponential moving average of a module's parameters, kept in a copy of the module."""

    def __init__(self, module: Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: Module) -> None:
        """Move towards `module`; faster in the beginning, when the average is still far behind."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


class Log:
    """A small table on stdout, at most one row every few seconds."""

    def __init__(self, columns: tuple[str, ...], every: float = 15.0) -> None:
        self.every, self.last = every, -math.inf
        print(" | ".join(columns), flush=True)

    def row(self, clock: Clock, values: dict[str, float | Tensor], force: bool = False) -> None:
        """Print step, seconds and the values when it is time."""
        if not force and clock.elapsed() - self.last < self.every:
            return
        self.last = clock.elapsed()
        cells = [f"{clock.step}", f"{clock.elapsed():.0f}", *(f"{float(v):.4g}" for v in values.values())]
        print(" | ".join(cells), flush=True)
