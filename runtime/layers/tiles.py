"""Exact tiles: which part of its input each layer needs, so that a tile of the result is that of the whole.

A layer whose output depends on its input's surroundings alone ("reach": how many pixels to each side, counted
on its output's grid) may work on a part of a picture. At a part's edge that is no edge of the picture its
results are wrong, as far as the reach goes; so a tile enters the layers with a margin, the halo, and each
layer is given no more of it than the layers that follow still need. What is left at the end is the tile, and
every number in it is what the whole picture gives: nothing is blended and there are no seams.

Layers that look at single pixels may also go through a picture in bands of rows, so that their intermediate
values stay small, where no kernel does all of it in one pass.

Pure arithmetic, along one axis at a time, without torch: the decode works by it and its costs are counted by
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

BAND_BYTES = 32 << 20
"""What a layer that goes by bands may take for its intermediate values: next to nothing beside a decode, and
on an H200 as fast as any from 16 MiB to 1 GiB."""

EVERYWHERE = 1 << 30
"""The reach of a layer that sees the whole frame."""


class Local(Protocol):
    """A layer whose surroundings are known; its output's grid is `scale` times as fine as its input's."""

    @property
    def reach(self) -> int:
        """Pixels of the output that it looks to each side."""

    @property
    def scale(self) -> int:
        """Output pixels for each input pixel, along height and along width."""


@dataclass(frozen=True)
class Span:
    """Pixels `start` to `stop`, the latter not included, of one axis."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def within(self, outer: "Span") -> slice:
        """Where this span lies in a tensor that holds `outer`."""
        return slice(self.start - outer.start, self.stop - outer.start)

    def times(self, scale: int) -> "Span":
        """The same part of the picture on a finer grid."""
        return Span(self.start * scale, self.stop * scale)


def cuts(length: int, parts: int) -> list[Span]:
    """`length` pixels in `parts` spans that differ by a pixel at most; fewer where there are fewer pixels."""
    parts = min(parts, length)
    edges = [i * length // parts for i in range(parts + 1)]
    return [Span(start, stop) for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class Rung:
    """One way to decode: `rows` x `columns` tiles from the Upsample `split` on; with None, nothing is cut.

    `split` 0 keeps small features (384 channels at the latents' size) for the tiles to begin with, 1 keeps
    eight times as much and computes less twice. A picture that is too small for so many tiles has fewer.
    """

    name: str
    split: int | None
    rows: int
    columns: int

    def __post_init__(self) -> None:
        """Raises ValueError where there is nothing to cut, or no way to."""
        if min(self.rows, self.columns) < 1:
            raise ValueError(f"{self.rows}x{self.columns} tiles, expected 1 or more each way")
        if self.split is None and self.rows * self.columns > 1:
            raise ValueError(f"{self.rows}x{self.columns} tiles without the Upsample that they begin with")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Size of what is cut, for latents of height x width: each Upsample before the split doubles it."""
        fine = 2 ** (self.split or 0)
        return height * fine, width * fine

    def tiles(self, height: int, width: int) -> list[tuple[Span, Span]]:
        """Rows and columns of each tile, on the grid of the split, for latents of height x width."""
        grid = self.grid(height, width)
        return [(row, column) for row in cuts(grid[0], self.rows) for column in cuts(grid[1], self.columns)]

    def pieces(self, length: int, height: int, width: int) -> int:
        """Pieces that a decode of latents of length x height x width hands out: each tile's latent frames."""
        return len(self.tiles(height, width)) * length


WHOLE = Rung("whole", None, 1, 1)


def halos(layers: Sequence[Local]) -> list[int]:
    """The margin that each layer's input must have, in its pixels, then that of the last output: 0.

    What needs n pixels of a layer's output needs ceil((n + reach) / scale) pixels of its input.
    """
    needed = [0]
    for layer in reversed(layers):
        needed.append(-(-(needed[-1] + layer.reach) // layer.scale))
    return needed[::-1]


def spans(tile: Span, length: int, layers: Sequence[Local]) -> list[Span]:
    """What of its input each layer is to get for the result at `tile`, then `tile` itself in the last output.

    `tile` is on the grid of the first input, which is `length` pixels long. A span ends where the picture
    does: there the layers' own padding is the right one.
    """
    found, scale = [], 1
    for halo, layer in zip(halos(layers), [*layers, None], strict=True):
        wanted = tile.times(scale)
        found.append(Span(max(wanted.start - halo, 0), min(wanted.stop + halo, length * scale)))
        scale *= 1 if layer is None else layer.scale
    return found


def crops(entering: Sequence[Span], layers: Sequence[Local]) -> list[slice]:
    """`spans` as slices: what the first layer gets of the picture, then what each gets of the one before."""
    first = slice(entering[0].start, entering[0].stop)
    pairs = zip(entering, layers, entering[1:], strict=False)
    return [first, *(after.within(before.times(layer.scale)) for before, layer, after in pairs)]


def band_rows(row_bytes: int) -> int:
    """Rows of a band whose intermediate values take `row_bytes` a row."""
    return max(BAND_BYTES // row_bytes, 1)
