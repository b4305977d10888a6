"""What streams: the matrices of a block, where their bytes lie in the files and in the buffer on the device.

A block's matrices lie one after the other in one flat buffer, its image, each at a multiple of 256 bytes:

    buffer[m.offset : m.offset + m.nbytes].view(m.dtype).view(m.shape)

They travel in pieces, each a part of one matrix that fits a chunk of the ring.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from runtime.checkpoint import Checkpoint, TensorInfo
from runtime.linear import QuantizedLinear
from runtime.memory.cached import CachedBlock
from runtime.memory.ring import Chunk
from runtime.memory.source import PAGE, WeightFiles

ALIGNMENT = 256  # of a matrix in its buffer: what a GPU allocation has, and more than any kernel asks for
_CONVERTED = 2**14  # elements at a time: so few that torch starts no threads of its own for them

Layout = tuple[tuple[torch.dtype, tuple[int, ...], int], ...]


@dataclass(frozen=True)
class Matrix:
    """One matrix: `owner` is its module within the block, `tensor` its name in the checkpoint."""

    owner: str
    tensor: str
    info: TensorInfo
    dtype: torch.dtype  # on the device; info.dtype is that of the file
    shape: tuple[int, ...]
    offset: int  # in the block's buffer, bytes

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.info.nbytes // self.info.dtype.itemsize * self.dtype.itemsize


@dataclass(frozen=True)
class StoredBlock:
    """The matrices of one block, in the order of their bytes in the buffer."""

    matrices: tuple[Matrix, ...]

    @cached_property
    def nbytes(self) -> int:
        """Size of the buffer that holds them on the device."""
        return max((align(matrix.offset + matrix.nbytes) for matrix in self.matrices), default=0)

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes that reading them takes from the files."""
        return sum(matrix.info.nbytes for matrix in self.matrices)

    @cached_property
    def layout(self) -> Layout:
        """Equal for blocks whose views of one buffer are the same."""
        return tuple((matrix.dtype, matrix.shape, matrix.offset) for matrix in self.matrices)

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The matrices as views of buffer (nbytes or more,) uint8, in the order of `matrices`."""
        return tuple(
            buffer[m.offset : m.offset + m.nbytes].view(m.dtype).view(m.shape) for m in self.matrices
        )


@dataclass(frozen=True)
class Piece:
    """Elements [first, first + count) of a matrix, counted row by row."""

    matrix: Matrix
    first: int
    count: int

    @property
    def position(self) -> int:
        """Where its bytes begin in the block's buffer."""
        return self.matrix.offset + self.first * self.matrix.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Its bytes on the device."""
        return self.count * self.matrix.dtype.itemsize


def align(nbytes: int) -> int:
    """nbytes, rounded up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def matrix_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Name within the block -> module, of those whose `weight` streams: its Linears, 8-bit or not."""
    return {name: m for name, m in block.named_modules() if isinstance(m, (nn.Linear, QuantizedLinear))}


def stored_block(
    checkpoint: Checkpoint,
    prefix: str,
    block: nn.Module,
    dtype: torch.dtype,
    fp32_parameters: tuple[str, ...] = (),
) -> StoredBlock:
    """Where the matrices of `block` are, whose names in `checkpoint` begin with `prefix` ("blocks.3.").

    8-bit matrices stay as they are; others become `dtype`, or fp32 where their name contains one of
    `fp32_parameters`, as `load_weights` does it.
    """
    matrices, offset = [], 0
    for owner, module in matrix_modules(block).items():
        name = f"{prefix}{owner}.weight"
        info = checkpoint.tensors[name]
        if isinstance(module, QuantizedLinear):
            wanted = module.form.dtype
        else:
            wanted = torch.float32 if any(part in name for part in fp32_parameters) else dtype
        matrices.append(Matrix(owner, name, info, wanted, info.shape, offset))
        offset = align(offset + matrices[-1].nbytes)
    return StoredBlock(tuple(matrices))


def split(block: StoredBlock, capacity: int) -> tuple[Piece, ...]:
    """The block in pieces of about equal size, of `capacity` bytes at most, stored and on the device."""
    pieces = []
    for matrix in block.matrices:
        size = max(matrix.dtype.itemsize, matrix.info.dtype.itemsize)
        elements = matrix.info.nbytes // matrix.info.dtype.itemsize
        parts = -(-elements * size // capacity)
        # Whole pages of elements, so that pieces of a matrix do not read a page twice
        step = -(-elements // parts // PAGE) * PAGE if parts > 1 else elements
        step = min(step, capacity // size)
        pieces += [Piece(matrix, first, min(step, elements - first)) for first in range(0, elements, step)]
    return tuple(pieces)


class PieceReader:
    """Fills chunks with pieces, from the cache or from the files; for any number of threads."""

    def __init__(self, files: WeightFiles, checkpoint: Checkpoint, blocks: Sequence[StoredBlock]) -> None:
        self.files = files
        self._checkpoint = checkpoint
        self._blocks = blocks
        self.cached: dict[int, CachedBlock] = {}
        self.cache_bytes = 0  # read from the cache so far
        self._whole: tuple[str, Tensor] | None = None
        self._lock = threading.Lock()

    def set_cached(self, cached: Sequence[int]) -> None:
        """The blocks to keep in memory from their next reading on; others are let go, and unpinned.

        So no copy may be on its way from those: whoever calls this has let the lane settle.
        """
        before = self.cached
        self.cached = {i: before[i] if i in before else self._room(self._blocks[i]) for i in cached}
        CachedBlock.release(before[index] for index in before.keys() - self.cached.keys())

    def _room(self, block: StoredBlock) -> CachedBlock:
        return CachedBlock(block.nbytes, sum(matrix.nbytes for matrix in block.matrices))

    def in_place(self, index: int, piece: Piece) -> tuple[Tensor, ...] | None:
        """The piece of block `index` where it lies, uint8, if that is pinned: nothing is to be filled then.

        In parts, in their order. They are valid until `set_cached` drops the block.
        """
        cache = self.cached.get(index)
        return None if cache is None else cache.in_place(piece.position, piece.nbytes)

    def count_cached(self, piece: Piece) -> None:
        """The piece goes to the device out of the cache."""
        with self._lock:
            self.cache_bytes += piece.nbytes

    def open(self, blocks: Sequence[int]) -> None:
        """Open the files of these blocks; WeightsError when one is gone."""
        for file in sorted({m.info.file for i in blocks for m in self._blocks[i].matrices}):
            self.files.open(file)

    def fill(self, index: int, piece: Piece, chunk: Chunk, stopped: Callable[[], bool]) -> Tensor:
        """The piece of block `index`: uint8 (piece.nbytes,), a part of the chunk's memory.

        Raises WeightsError, and ReadStopped when `stopped()` says so.
        """
        cache = self.cached.get(index)
        memory = np.frombuffer(chunk.space, dtype=np.uint8)
        if cache is not None and cache.get(piece.position, memory[: piece.nbytes]):
            self.count_cached(piece)
            return chunk.bytes[: piece.nbytes]
        del cache  # a read that hangs must not keep what is let go meanwhile
        begin = self._read(piece, chunk, stopped)
        if piece.matrix.dtype != piece.matrix.info.dtype:
            convert(memory, begin, piece)
            begin = 0
        cache = self.cached.get(index)
        if cache is not None:
            cache.put(piece.position, memory[begin : begin + piece.nbytes])
        return chunk.bytes[begin : begin + piece.nbytes]

    def _read(self, piece: Piece, chunk: Chunk, stopped: Callable[[], bool]) -> int:
        """The piece as stored -> where it begins in the chunk."""
        info = piece.matrix.info
        first, nbytes = piece.first * info.dtype.itemsize, piece.count * info.dtype.itemsize
        if info.offset is not None:
            offset = info.offset + first
            self.files.read(info.file, offset, nbytes, chunk.space, piece.matrix.tensor, stopped)
            return offset % PAGE
        # A .pth can store a matrix in another order than ours; then it is read whole, for its pieces in turn.
        with self._lock:
            if self._whole is None or self._whole[0] != piece.matrix.tensor:
                self._whole = None
                self._whole = piece.matrix.tensor, self._checkpoint.read(piece.matrix.tensor)
            stored = self._whole[1].reshape(-1).view(torch.uint8)[first : first + nbytes]
            np.copyto(np.frombuffer(chunk.space, dtype=np.uint8)[:nbytes], stored.numpy())
            if first + nbytes == info.nbytes:
                self._whole = None
        return 0


def convert(memory: np.ndarray, begin: int, piece: Piece) -> None:
    """Cast a piece from the file's dtype at memory[begin:] to the device's at memory[0:], in place.

    A few elements at a time: no second buffer of the piece's size. memory (bytes of a chunk,) uint8.
    """
    stored, wanted = piece.matrix.info.dtype, piece.matrix.dtype
    raw = piece.count * stored.itemsize
    if begin:  # a file may place a tensor at any byte, a view of a dtype may not; the ranges may overlap
        ctypes.memmove(memory.ctypes.data, memory.ctypes.data + begin, raw)
    bytes_ = torch.from_numpy(memory)
    source = bytes_[:raw].view(stored)
    target = bytes_[: piece.nbytes].view(wanted)
    starts = range(0, piece.count, _CONVERTED)
    # Narrowing writes behind what is still to be read; widening must begin at the end.
    for start in starts if wanted.itemsize <= stored.itemsize else reversed(starts):
        part = slice(start, min(start + _CONVERTED, piece.count))
        target[part] = source[part].to(wanted)
