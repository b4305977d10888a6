"""What cross attention makes of a text, kept from one forward to the next: it depends on the text alone."""

from collections.abc import Callable

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]
"""Of a text in one block, (B, S, H, D/H) each; whoever computes with them leaves them as they are."""


class KeptText:
    """Keys and values of one text in all blocks: made in its first forward, there for all later ones.

    Bytes: 2·B·S·D numbers a block, in one tensor. A block's are there once it has made them, so a first
    forward that ends half way leaves the rest to the next. After `drop` each forward makes its own.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._room: Tensor | None = None  # (blocks, 2, B, S, H, D/H)
        self._made: set[int] = set()
        self._dropped = False

    @property
    def complete(self) -> bool:
        """Whether no block has to make its own any more."""
        return len(self._made) == self._blocks

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return 0 if self._room is None else self._room.nbytes

    def make_room(self, text: Tensor, num_heads: int) -> None:
        """Take the memory for `text` (B, S, D), unless it is there."""
        if self._room is None and not self._dropped:
            room = text.new_empty((self._blocks, 2, *text.shape))
            self._room = room.unflatten(-1, (num_heads, -1))

    def of(self, number: int, make: Callable[[], KeysValues]) -> KeysValues:
        """Those of block `number`: kept, or by `make` and kept from now on; of the same bits either way."""
        if number in self._made and self._room is not None:
            return self._room[number, 0], self._room[number, 1]
        keys, values = make()
        if self._room is None:
            return keys, values
        self._room[number, 0].copy_(keys)
        self._room[number, 1].copy_(values)
        self._made.add(number)
        return self._room[number, 0], self._room[number, 1]

    def drop(self) -> None:
        """Free the memory, for good."""
        self._made.clear()
        self._room, self._dropped = None, True
