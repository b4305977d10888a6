"""A few rows of what a run computes, computed again the slow way: kernels are checked on the run's own data.

Nothing here waits for the device: distances are kept on it and read with the numbers of the step.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.kernels.launch import twins
from runtime.layers.attention import Attend
from runtime.layers.backends import BOUNDS
from runtime.linear.int8 import Int8Linear
from runtime.linear.module import QuantizedLinear, forced_way
from runtime.transformer import Block, Transformer

SAMPLED_ROWS, SAMPLED_HEADS = 8, 2
ROW_MARGIN = 4.0
"""BOUNDS are of whole tensors; a single row of 128 numbers may lie so many times as far."""
KERNEL_BOUNDS = {8: 0.15, 16: 0.05, 32: 5e-3}
"""Relative, for rows of a block, by the bits of its products. A kernel rounds elsewhere than its twin: where
it quantizes what the twin has rounded to bf16 before, some 3 % of the numbers move by a step of 6 %."""
SAMPLED_BLOCKS = 10  # of each forward, at least; others in the next
_ROUNDINGS = 8  # a block that changes its input by fewer units of its dtype's rounding is measured by these
TILE_TOKENS = 64  # the last so many rows may be a tile that is not whole: one of them is always looked at
_KEY_CHUNK = 8192  # keys that are fp32 at a time: 8 MiB for two heads of 128
_CALLS = 64  # rows are drawn for so many calls at once


class AttentionSample:
    """An `Attend` that computes a few rows of every call by the formula, in fp32 over all keys.

    Each call: SAMPLED_ROWS queries (the last, one of the last tile, others by chance) of SAMPLED_HEADS heads,
    other ones for each call and step, the same in each run. The expected rows come before the attention
    itself, so they are safe from one that writes to its inputs, and what they need is gone when it begins:
    two heads of _KEY_CHUNK keys or values and the scores, 13 MB at 75,600 tokens. Nothing is read back
    here: `numbers` is.
    """

    def __init__(self, run: Attend, bits: int) -> None:
        self._run = run
        self.bound = ROW_MARGIN * BOUNDS[bits]
        self._heads = np.random.default_rng(0)
        self._rows: Tensor | None = None  # (_CALLS, SAMPLED_ROWS), of this step
        self._found: list[Tensor] = []
        self._step = 0
        self.kernels: KernelSample | None = None

    def begin(self, step: int) -> None:
        """A forward begins: what was found before is forgotten."""
        self._heads, self._step = np.random.default_rng([step]), step
        self._rows, self._found = None, []

    def numbers(self) -> Tensor:
        """(calls, 2) fp32 on the device: the largest distance, and 1 where the inputs were not finite."""
        return torch.stack(self._found) if self._found else torch.zeros(0, 2)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attend`."""
        rows, batch, heads = self._chosen(q)
        expected = expected_rows(
            q[batch, :, heads].index_select(0, rows), k[batch, :, heads], v[batch, :, heads]
        )
        if self.kernels is not None:
            self.kernels.entering(q, k, v)
        out = self._run(q, k, v)
        if self.kernels is not None:
            self.kernels.leaving(out)
        self._found.append(_distance(out[batch, :, heads].index_select(0, rows), expected))
        return out

    def _chosen(self, q: Tensor) -> tuple[Tensor, int, slice]:
        """Rows on the device, an element of the batch, heads as a slice; nothing waits for the device."""
        call = len(self._found)
        if self._rows is None or call % _CALLS == 0:
            self._rows = _drawn_rows(q.shape[1], q.device, self._step * 1_000_003 + call)
        some = sorted(self._heads.choice(q.shape[2], min(SAMPLED_HEADS, q.shape[2]), replace=False).tolist())
        heads = slice(some[0], some[-1] + 1, max(some[-1] - some[0], 1))
        return self._rows[call % _CALLS], call % q.shape[0], heads


def _drawn_rows(length: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(low: int, columns: int) -> Tensor:
        return torch.randint(low, length, (_CALLS, columns), generator=generator, device=device)

    last = torch.full((_CALLS, 1), length - 1, device=device)
    return torch.cat([last, drawn(max(length - TILE_TOKENS, 0), 1), drawn(0, SAMPLED_ROWS - 2)], dim=1)


def expected_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v in fp32: q (R, H, D), k and v (S, H, D) -> (H, R, D)."""
    queries = q.float().transpose(0, 1) * q.shape[-1] ** -0.5  # (H, R, D)
    scores = torch.cat([queries @ part.float().permute(1, 2, 0) for part in k.split(_KEY_CHUNK)], dim=-1)
    weights = scores.softmax(-1)  # (H, R, S)
    del scores
    out = torch.zeros_like(queries)
    for some, part in zip(weights.split(_KEY_CHUNK, dim=-1), v.split(_KEY_CHUNK), strict=True):
        out.baddbmm_(some, part.float().transpose(0, 1))
    return out


def _distance(rows: Tensor, expected: Tensor) -> Tensor:
    """(2,): the largest distance of rows (R, H, D) from expected (H, R, D), and whether that is not finite.

    Relative to the row's own length or, where that is less, to the head's average: a row whose values cancel
    out has the errors of its summands.
    """
    return _pair(_apart(rows.transpose(0, 1), expected), expected)


def _apart(rows: Tensor, expected: Tensor) -> Tensor:
    lengths = expected.float().norm(dim=-1)
    scale = torch.maximum(lengths, lengths.mean(dim=-1, keepdim=True)).clamp_min(1e-30)
    return ((rows.float() - expected.float()).norm(dim=-1) / scale).amax()


def _pair(worst: Tensor, expected: Tensor) -> Tensor:
    broken = ~torch.isfinite(expected).all()
    return torch.stack([torch.where(broken, 0.0, worst), broken.float()])


class KernelSample:
    """Looks at a few rows of blocks and of the head: what fused kernels and what their twins make of them.

    Outside of the attention, rows have nothing to do with each other. So a block runs once more on the rows
    alone, by the twins, with the attention's own result in the place of the attention: queries, keys, values
    and the block's change of its rows must be those that the kernels made. SAMPLED_BLOCKS of each forward.
    """

    def __init__(self, transformer: Transformer, attention: AttentionSample) -> None:
        self._found: list[Tensor] = []
        self._count, self._step, self._calls = 0, 0, 0
        self._table: Tensor | None = None  # (_CALLS, SAMPLED_ROWS)
        self._rows: Tensor | None = None  # while a sampled block runs
        self._inputs: tuple[Any, ...] = ()
        self._entered: list[Tensor] = []
        self._mixed: Tensor | None = None
        self._hooks: list[Any] = []
        self._attention = attention
        attention.kernels = self
        linear = transformer.get_submodule("blocks.0.self_attn.q")
        dtype = transformer.patch_embedding.weight.dtype
        bits = 8 if isinstance(linear, QuantizedLinear) else 8 * dtype.itemsize
        self.bound = KERNEL_BOUNDS[min(bits, 32)]
        for block in transformer.blocks.children():
            self._hooks.append(block.register_forward_pre_hook(self._begin_block))
            self._hooks.append(block.register_forward_hook(self._end_block))
            self._count += 1
        self._hooks.append(transformer.head.register_forward_hook(self._end_head))

    def close(self) -> None:
        """Leave the transformer as it was."""
        self._attention.kernels = None
        for hook in self._hooks:
            hook.remove()

    def begin(self, step: int) -> None:
        """A forward begins: what was found before is forgotten."""
        self._step, self._calls = step, 0
        self._found, self._table, self._rows = [], None, None

    def numbers(self) -> Tensor:
        """(samples, 2) fp32 on the device, as for the attention: two of a block, and those of the head."""
        return torch.stack(self._found) if self._found else torch.zeros(0, 2)

    def entering(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """The attention of the block that runs begins."""
        if self._rows is not None:
            self._entered = [x.index_select(1, self._rows) for x in (q, k, v)]

    def leaving(self, out: Tensor) -> None:
        """It has ended."""
        if self._rows is not None:
            self._mixed = out.index_select(1, self._rows)

    def _begin_block(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        call, self._calls = self._calls, self._calls + 1
        self._rows = None
        if (call + self._step) % max(self._count // SAMPLED_BLOCKS, 1):
            return
        x, time, text, rope, *_ = args
        if self._table is None:
            self._table = _drawn_rows(x.shape[1], x.device, 17 + self._step)
        self._rows = rows = self._table[call % _CALLS]
        of_rope = tuple(table.index_select(1, rows) for table in rope)
        self._inputs = (x.index_select(1, rows), time, text, of_rope)

    def _end_block(self, block: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        if self._rows is None or self._mixed is None:
            return
        assert isinstance(block, Block)
        mixed, again = self._mixed, list[Tensor]()

        def mix(*qkv: Tensor) -> Tensor:
            again.extend(qkv)
            return mixed

        usual = block.self_attn.mix
        block.self_attn.mix = mix
        try:
            with _slowly(block.self_attn.q, mixed):
                expected = block.forward(*self._inputs)  # (B, R, D)
        finally:
            block.self_attn.mix = usual
        x, floor = self._inputs[0].float(), _ROUNDINGS * torch.finfo(result.dtype).eps
        change = (expected - x).norm(dim=-1) + floor * x.norm(dim=-1)
        apart = (result.index_select(1, self._rows).float() - expected.float()).norm(dim=-1) / change
        made, right = (torch.stack(qkv).flatten(3).flatten(0, 1) for qkv in (self._entered, again))
        self._found += [_pair(_apart(made, right), right), _pair(apart.amax(), expected)]
        self._rows, self._mixed, self._entered, self._inputs = None, None, [], ()

    def _end_head(self, head: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        x, time = args
        rows = _drawn_rows(x.shape[1], x.device, 29 + self._step)[0]
        with twins():
            expected = head.forward(x.index_select(1, rows), time)
        self._found.append(_pair(_apart(result.index_select(1, rows), expected), expected))


def _slowly(linear: nn.Module, rows: Tensor) -> AbstractContextManager[Any]:
    """By the twins; but for the fused product of integers, whose twin would hold whole weights in fp32."""
    stack = ExitStack()
    stack.enter_context(twins())
    by_kernel = rows.is_cuda and isinstance(linear, Int8Linear) and linear.way(rows) == "fused"
    stack.enter_context(forced_way("integer") if by_kernel else nullcontext())
    return stack
