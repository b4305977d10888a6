"""Random tensors of the right scale, as fast as memory can be copied; the same bytes on every machine.

They come from one table of normal numbers: a tensor is made of stretches of the table that begin where its
name and the seed say, scaled to its deviation. No two tensors begin alike but by chance.

Matrices have a deviation of fan_in^-1/2, so that inputs of deviation one give outputs of deviation one.
Eight-bit codes fill their range as a converter leaves them, with scales that bring them to that deviation.
"""

import threading
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from runtime.checkpoint.checkpoint import SCALE
from runtime.linear.quantize import FP8, INT8

FORMAT = 1
"""Of the numbers: another one gives others for the same seed."""

TABLE = 1 << 24  # numbers; 64 MiB in fp32
STRETCH = 1 << 20  # numbers of one stretch at most
_CODE_RANGE = 4.0  # the largest of 5,000 normal numbers lies at about four deviations: there qmax is
_CODE_DEVIATION = {FP8.dtype: FP8.qmax / _CODE_RANGE, INT8.dtype: INT8.qmax / _CODE_RANGE}
_SCALES = (SCALE, ".scale_weight")


class Noise:
    """Tensors of random numbers; the same for the same seed, name, shape and dtype, on every machine.

    Memory: the table, and its copies in the other dtypes that were asked for (64 + 32 + 16 MiB).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        # numpy's generator: torch's gives other bits with other vector instructions
        normal = np.random.default_rng([seed, FORMAT]).standard_normal(TABLE, dtype=np.float32)
        self._tables = {torch.float32: torch.from_numpy(normal)}
        self._guard = threading.Lock()

    def pieces(self, name: str, like: Tensor, plan: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The elements of a tensor of the file, in order, as flat tensors; each is valid until the next.

        plan: all tensors of the file, since a scale depends on its matrix.
        """
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        if name.endswith(_SCALES):
            yield self._scales(name, like, plan, random)
            return
        table = self._table(like.dtype)
        mean, deviation = _law(name, like)
        buffer = torch.empty(min(STRETCH, like.numel()), dtype=like.dtype)
        for start, count in _stretches(like.numel(), random):
            stretch = table[start : start + count]
            if like.dtype in _CODE_DEVIATION:
                yield stretch
                continue
            piece = torch.mul(stretch, deviation, out=buffer[:count])
            yield piece.add_(mean) if mean else piece

    def tensor(self, name: str, like: Tensor, plan: Mapping[str, Tensor]) -> Tensor:
        """The whole tensor."""
        flat, done = torch.empty(like.numel(), dtype=like.dtype), 0
        for piece in self.pieces(name, like, plan):
            flat[done : done + piece.numel()] = piece
            done += piece.numel()
        return flat.reshape(like.shape)

    def _table(self, dtype: torch.dtype) -> Tensor:
        with self._guard:
            if dtype not in self._tables:
                normal = self._tables[torch.float32]
                codes = _CODE_DEVIATION.get(dtype)
                if codes is not None:
                    normal = (normal * codes).clamp_(-codes * _CODE_RANGE, codes * _CODE_RANGE)
                    normal = normal.round_() if dtype == INT8.dtype else normal
                self._tables[dtype] = normal.to(dtype)
            return self._tables[dtype]

    def _scales(
        self, name: str, like: Tensor, plan: Mapping[str, Tensor], random: np.random.Generator
    ) -> Tensor:
        matrix = plan[name.rpartition(".")[0] + ".weight"]
        middle = matrix.shape[1] ** -0.5 / _CODE_DEVIATION[matrix.dtype]
        values = random.uniform(0.9 * middle, 1.1 * middle, max(like.numel(), 1))
        return torch.from_numpy(values).to(like.dtype)


def _law(name: str, like: Tensor) -> tuple[float, float]:
    """Mean and deviation of a floating tensor."""
    if "modulation" in name:
        return 0.0, 0.1
    if "gamma" in name or (like.ndim == 1 and name.endswith("weight")):
        return 1.0, 0.1
    if like.ndim > 1:
        return 0.0, float(like[0].numel()) ** -0.5
    return 0.0, 0.02


def _stretches(count: int, random: np.random.Generator) -> Iterator[tuple[int, int]]:
    """(beginning in the table, length) of stretches that make `count` numbers."""
    for done in range(0, count, STRETCH):
        length = min(STRETCH, count - done)
        yield int(random.integers(0, TABLE - length)), length
