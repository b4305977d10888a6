"""How the positions of images lie in memory: what the kernels of the video VAE need to know of a view.

Position p of x (B, C, positions...) lies p // width * row + p % width * step numbers after the first. That
holds for every contiguous and every channels-last tensor (one run: width is all of them), for any range of
channels or frames of one, and for a rectangle cut out of one, whose runs are its lines.
"""

from typing import NamedTuple

from torch import Tensor


class Runs(NamedTuple):
    """Runs of `width` positions that lie `step` numbers apart; a run begins `row` after the one before."""

    width: int
    row: int
    step: int


def runs_of(x: Tensor) -> Runs | None:
    """The runs of x (B, C, ...); None where its positions lie in no such order."""
    axes: list[tuple[int, int]] = []  # (size, stride), outer to inner, those joined that follow each other
    for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return None
    width, step = axes[-1] if axes else (1, 1)
    return Runs(width, axes[0][1] if len(axes) == 2 else width * step, step)


def same_runs(x: Tensor, y: Tensor) -> tuple[Runs, Runs] | None:
    """The runs of x and y, both of one shape, in runs of one width; None where there is none."""
    a, b = runs_of(x), runs_of(y)
    if a is None or b is None:
        return None
    if a.width > b.width and a.width % b.width == 0:
        a = _cut(a, b.width, x)
    elif b.width > a.width and b.width % a.width == 0:
        b = _cut(b, a.width, y)
    return (a, b) if a is not None and b is not None and a.width == b.width else None


def _cut(runs: Runs, width: int, x: Tensor) -> Runs | None:
    """One run of all positions of x as runs of `width`; None where there are several already."""
    if runs.width != x[0, 0].numel():
        return None
    return Runs(width, width * runs.step, runs.step)
