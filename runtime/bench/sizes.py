"""Sizes of videos as the bench is asked for them, and how much work they are. No torch."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from runtime.errors import RequestError
from runtime.request import Request

_PATTERN = re.compile(r"(\d{1,6})x(\d{1,6})x(\d{1,6})")


@dataclass(frozen=True)
class Size:
    """A video: pixels and frames."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"

    def request(self, prompt: str | None = None, seed: int = 42) -> Request:
        """The model's own steps and sampler for a video of this size."""
        return Request(prompt=prompt, seed=seed, height=self.height, width=self.width, frames=self.frames)


def words(text: str) -> list[str]:
    """`a,b c` -> a, b, c: each once, in their order."""
    return list(dict.fromkeys(part for part in re.split(r"[,\s]+", text) if part))


def read_sizes(text: str) -> tuple[Size, ...]:
    """`480x832x81,720x1280x81` -> sizes; RequestError for anything else."""
    found = []
    for word in words(text):
        match = _PATTERN.fullmatch(word)
        if match is None:
            raise RequestError(f"--sizes has {word!r}; expected HEIGHTxWIDTHxFRAMES, like 480x832x81.")
        found.append(Size(*map(int, match.groups())))
    if not found:
        raise RequestError("--sizes is empty; expected HEIGHTxWIDTHxFRAMES, like 480x832x81.")
    return tuple(found)


# --- work ---


@dataclass(frozen=True)
class Product:
    """y (rows, columns) = x (rows, depth)·Wᵀ in one class of linears, of rows that are quantized or not."""

    rows: int
    columns: int
    depth: int
    prepared: bool = False

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.columns * self.depth


@dataclass(frozen=True)
class Mix:
    """Attention of `tokens` queries to `keys`, in `heads` of `width`."""

    tokens: int
    keys: int
    heads: int
    width: int

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products; the softmax is not counted, as nobody does."""
        return 4 * self.tokens * self.keys * self.heads * self.width


@dataclass(frozen=True)
class Work:
    """What one forward asked for: which operations, and how often each."""

    of_tokens: Counter[Mix]
    on_text: Counter[Mix]
    products: Counter[Product]

    @property
    def largest(self) -> Product:
        """The product with the most operations for a row; of those the one with the most rows."""
        return max(self.products, key=lambda one: (one.columns * one.depth, one.rows, one.columns))

    def words(self) -> str:
        """`40 self attentions, 320 cross attentions, 2960 products`."""
        counts = (self.of_tokens.total(), self.on_text.total(), self.products.total())
        return "{} self attentions, {} cross attentions, {} products".format(*counts)


def operations(counted: Iterable[tuple[Product | Mix, int]]) -> int:
    """Of all that was counted."""
    return sum(one.operations * times for one, times in counted)
