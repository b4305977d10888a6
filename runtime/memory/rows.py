"""An embedding whose table stays in its file: the rows of the tokens that occur are read, and no others.

umT5's table has 256,384 rows of 4,096 numbers, 2.1 GB in bf16; a prompt needs a few dozen of them.
"""

import mmap
import threading

import torch
from torch import Tensor, nn

from runtime.checkpoint import Checkpoint
from runtime.memory.source import SLACK, WeightFiles


class StoredEmbedding(nn.Module):
    """Stands in for an `nn.Embedding`; `name` is its table (rows, width) in `checkpoint`, floating."""

    def __init__(self, checkpoint: Checkpoint, name: str, files: WeightFiles, dtype: torch.dtype) -> None:
        super().__init__()
        self._checkpoint, self._name, self._files, self.dtype = checkpoint, name, files, dtype
        self._info = checkpoint.tensors[name]
        self.num_embeddings, self.embedding_dim = self._info.shape
        self._row_bytes = self._info.nbytes // self.num_embeddings
        self._space = memoryview(mmap.mmap(-1, self._row_bytes + SLACK))
        self._lock = threading.Lock()
        self._room = 0  # rows that may be kept
        self._slots: dict[int, int] = {}  # row of the table -> row of what is kept
        self._kept: Tensor | None = None  # (room, D)
        self._home: torch.device | None = None
        if self._info.offset is not None:
            files.open(self._info.file)

    def extra_repr(self) -> str:
        """The sizes and the file."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rows read from {self._info.file.name}"

    def keep(self, room: int, home: torch.device | None = None) -> None:
        """Keep up to `room` rows, once read, on `home` or the device of the ids: for prompt after prompt."""
        self._room, self._slots, self._kept = min(room, self.num_embeddings), {}, None
        self._home = home

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) or any shape, integers -> (B, L, D) of the compute dtype, on the device of ids.

        Equal to a loaded table's rows, bit for bit. Raises IndexError for an id outside of the table and
        WeightsError when the file cannot be read. Waits for ids if they are on a GPU.
        """
        rows, places = torch.unique(ids.cpu(), return_inverse=True)  # ascending: in the order of the file
        if rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < self.num_embeddings:
            outside = rows[0] if rows[0] < 0 else rows[-1]
            raise IndexError(f"token {int(outside)} is outside of the table's {self.num_embeddings} rows")
        if 0 < rows.numel() <= self._room:
            kept, slots = self._keeping(rows.tolist(), self._home or ids.device)
            return kept[slots[places].to(kept.device)].to(ids.device)  # (*ids.shape, D)
        table = self._read(rows).to(self.dtype)  # (unique, D)
        return table[places].to(ids.device)  # (*ids.shape, D)

    def _keeping(self, rows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """What is kept, (room, D), these rows among it, and where each of them is, (n,) int64."""
        if self._kept is None or self._kept.device != device:
            self._slots = {}
            self._kept = torch.empty(self._room, self.embedding_dim, dtype=self.dtype, device=device)
        new = [row for row in rows if row not in self._slots]
        if len(self._slots) + len(new) > self._room:
            self._slots, new = {}, rows
        if new:
            first = len(self._slots)
            self._kept[first : first + len(new)] = self._read(torch.tensor(new)).to(self.dtype).to(device)
            self._slots |= {row: first + place for place, row in enumerate(new)}
        return self._kept, torch.tensor([self._slots[row] for row in rows])

    def _read(self, rows: Tensor) -> Tensor:
        """The rows (n,), as stored: (n, D)."""
        if self._info.offset is None:  # a .pth that stores the table in another order: through its mapping
            return self._checkpoint.read(self._name)[rows]
        stored = torch.empty(len(rows) * self._row_bytes, dtype=torch.uint8)
        offsets = [self._info.offset + row * self._row_bytes for row in rows.tolist()]
        with self._lock:  # one space for all
            self._files.read_rows(self._info.file, offsets, stored.numpy().data, self._space, self._info.name)
        return stored.view(self._info.dtype).reshape(len(rows), self.embedding_dim)
