"""What a conversion costs: for each matrix, how far what was stored is from what was read.

  error[m] = |stored[m] - read[m]| / |read[m]|      of row m, Euclidean norms over its entries; 0 for 0/0

and the same over the whole matrix: the relative RMS error. On Gaussian rows it is about 2.7 % for fp8 and
0.9 % for int8; trained rows have outliers, which cost int8 more.
"""

import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from runtime.linear.quantize import Format

SLICE_ELEMENTS = 2**20  # of a matrix at a time, so that what is computed on the way stays in the cache
# Division by a scale that is itself rounded may pass qmax by a last bit; that is no loss.
_ROUNDING = 1 + 2.0**-20
_TINY = 2.0**-126


@dataclass(frozen=True)
class LayerError:
    """One matrix: relative RMS errors of it and of its worst row, and how its rows fill the format's range.

    largest_scale is None for a matrix that is stored without scales. saturated: entries beyond
    qmax * scale, which were cut to it; none with fp32 scales, as a row's scale comes from its largest entry.
    """

    name: str
    shape: tuple[int, int]
    error: float
    worst_row: int
    worst_row_error: float
    largest_scale: float | None
    saturated: int

    @property
    def kind(self) -> str:
        """The matrix's place in its block: `self_attn.q`, `ffn.0`."""
        return re.sub(r"^blocks\.\d+\.", "", self.name)

    @classmethod
    def restored(cls, entry: Any) -> "LayerError":
        """From what `asdict` and JSON made of it; ValueError if it is anything else."""
        if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(cls)}:
            raise ValueError("not the error of a layer")
        shape, numbers = entry["shape"], [entry["error"], entry["worst_row_error"], entry["saturated"]]
        if not isinstance(shape, list) or not isinstance(entry["name"], str):
            raise ValueError("not the error of a layer")
        if not all(isinstance(number, int | float) for number in (*shape, *numbers)):
            raise ValueError("not the error of a layer")
        return cls(**(entry | {"shape": tuple(shape)}))


@dataclass(frozen=True)
class KindSummary:
    """The errors of one kind of matrix over all blocks."""

    kind: str
    count: int
    mean: float
    median: float
    max: float


def measure(name: str, read: Tensor, stored: Tensor, scale: Tensor | None, form: Format | None) -> LayerError:
    """Compare a matrix (out, in) with what stands for it in the file: `stored` times `scale` (out, 1).

    scale and form are None for a matrix stored in floating point. Memory: a slice of rows.
    """
    rows, columns = read.shape
    lost, given = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    scales = None if scale is None else scale.float().reshape(-1, 1).expand(rows, 1)
    saturated = 0
    step = max(SLICE_ELEMENTS // max(columns, 1), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        before, after = read[part].float(), stored[part].float()
        if scales is None:  # divided by something of its size all the same: squares must not overflow
            unit = before.abs().amax(-1, keepdim=True).clamp_min(_TINY)
            after = after / unit
        else:
            unit = scales[part]
        before = before / unit
        if form is not None:
            saturated += int((before.abs() > form.qmax * _ROUNDING).sum())
        lost[part] = torch.linalg.vector_norm(after - before, dim=-1).double() * unit[:, 0]
        given[part] = torch.linalg.vector_norm(before, dim=-1).double() * unit[:, 0]
    errors = torch.where(given > 0, lost / given.clamp_min(1e-300), torch.zeros_like(lost))
    worst = int(errors.argmax())
    whole, total = float(lost.norm()), float(given.norm())
    return LayerError(
        name=name,
        shape=(rows, columns),
        error=_digits(whole / total if total else 0.0),
        worst_row=worst,
        worst_row_error=_digits(float(errors[worst])),
        largest_scale=None if scale is None else float(scale.float().max()),
        saturated=saturated,
    )


def unchanged(name: str, stored: Tensor, scale: Tensor | None) -> LayerError:
    """The entry of a matrix that was copied as it is: no error."""
    largest = None if scale is None else float(scale.float().max())
    return LayerError(name, (stored.shape[0], stored.shape[1]), 0.0, 0, 0.0, largest, 0)


def by_kind(layers: Iterable[LayerError]) -> list[KindSummary]:
    """Mean, median and largest error of each kind of matrix, in the order of their first layer."""
    errors: dict[str, list[float]] = {}
    for layer in layers:
        errors.setdefault(layer.kind, []).append(layer.error)
    return [
        KindSummary(kind, len(e), _digits(statistics.fmean(e)), _digits(statistics.median(e)), max(e))
        for kind, e in errors.items()
    ]


def worst(layers: Iterable[LayerError], count: int = 10) -> list[LayerError]:
    """The layers with the largest errors, worst first; equal ones in the order of their names."""
    return sorted(layers, key=lambda layer: (-layer.error, layer.name))[:count]


def as_json(layers: Iterable[LayerError]) -> dict[str, Any]:
    """All layers and the summary of each kind, for a file."""
    layers = list(layers)
    return {"by_kind": [asdict(s) for s in by_kind(layers)], "layers": [asdict(layer) for layer in layers]}


def _digits(number: float) -> float:
    """Six significant digits: what the sums, whose order depends on threads, agree on."""
    return number if number == 0 else round(number, 5 - math.floor(math.log10(abs(number))))
