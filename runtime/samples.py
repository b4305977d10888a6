"""A few rows of what a run computes, computed again the slow way: kernels are checked on the run's own data.

Nothing here waits for the device: distances are kept on it and read with the numbers of the step.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.kernels.launch import twins
from runtime.layers.attention import Attend
from runtime.layers.backends import BOUNDS
from runtime.layers.compact_qk import MixCompact, QKScales, compact_of, picked, restored
from runtime.linear.module import QuantizedLinear
from runtime.transformer import Block, Transformer

SAMPLED_ROWS, SAMPLED_HEADS = 8, 2
ROW_MARGIN = 4.0
"""BOUNDS are of whole tensors; a single row of 128 numbers may lie so many times as far."""
KERNEL_BOUNDS = {8: 0.15, 16: 0.05, 32: 5e-3}
"""Relative, for rows of a block, by the bits of its products. A kernel rounds elsewhere than its twin: where
it quantizes what the twin has rounded to bf16 before, some 3 % of the numbers move by a step of 6 %."""
SAMPLED_BLOCKS = 5  # of each forward, at least, whose kernels are looked at; others in the next step
ROUNDINGS = 8  # a block that changes its input by fewer units of its dtype's rounding is measured by these
TILE_TOKENS = 64  # the last so many rows may be a tile that is not whole: one of them is always looked at
_FP32_BYTES = 40_000_000
"""Of keys or values in fp32 at a time: two heads of 128 up to 39,062 tokens, one head beyond."""
_MOST_PIECES = 64
"""Of the keys, for the sum over them: 8 rows by 128 columns are one tile, on one core of many."""
_CALLS = 64  # rows are drawn for so many calls at once


class AttentionSample:
    """An `Attend` that computes a few rows of every second block by the formula, in fp32 over all keys.

    Of `blocks`, the first and the last in each step, the others in every second one: any two steps in a row
    look at all. There SAMPLED_ROWS queries (the last, one of the last tile, others by chance) of
    SAMPLED_HEADS heads, other ones for each block and step, the same in each run. The expected rows come
    before the attention itself, so they are safe from one that writes to its inputs, and what they need is
    gone when it begins: _FP32_BYTES and the scores, 44 MB at 75,600 tokens. Nothing is read back here, and
    the rows are compared when a step is done: `numbers`. Each operation costs a launch.

    compact: the same for compact queries and keys, where `run` takes such; rows are then of what they hold.
    """

    def __init__(self, run: Attend, bits: int, blocks: int = 1) -> None:
        self._run, self._blocks = run, blocks
        self._run_compact = compact_of(run)
        self.compact: MixCompact | None = None if self._run_compact is None else self._sampled
        self.bound = ROW_MARGIN * BOUNDS[bits]
        self.kernels: KernelSample | None = None
        self.begin(0)

    def begin(self, step: int) -> None:
        """The forwards of a step begin: what was found before is forgotten."""
        self._heads, self._step, self._calls = np.random.default_rng([step]), step, 0
        self._rows: Tensor | None = None  # (_CALLS, SAMPLED_ROWS), of this step
        self._made: list[Tensor] = []  # (R, H, D) each
        self._expected: list[Tensor] = []  # (H, R, D) each

    def numbers(self) -> Tensor:
        """(samples, 2) fp32 on the device: the largest distance, and 1 where the inputs were not finite."""
        if not self._made:
            return torch.zeros(0, 2)
        made = torch.stack(self._made).transpose(1, 2)  # (samples, H, R, D)
        found = _against(made, torch.stack(self._expected))  # (samples, H, R) each
        return _pairs(*(rows.flatten(1) for rows in found))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attend`."""
        return self._sampled(q, k, v)

    def _sampled(self, q: Tensor, k: Tensor, v: Tensor, scales: QKScales | None = None) -> Tensor:
        block, self._calls = self._calls % self._blocks, self._calls + 1
        if self.kernels is not None:
            self.kernels.entering(q, k, v, scales)
        if block in (0, self._blocks - 1) or (block + self._step) % 2 == 0:
            out = self._looked_at(q, k, v, scales)
        else:
            out = self._attend(q, k, v, scales)
        if self.kernels is not None:
            self.kernels.leaving(out)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scales: QKScales | None) -> Tensor:
        if scales is None:
            return self._run(q, k, v)
        assert self._run_compact is not None
        return self._run_compact(q, k, v, scales)

    def _looked_at(self, q: Tensor, k: Tensor, v: Tensor, scales: QKScales | None) -> Tensor:
        rows, batch, heads = self._chosen(q)
        some, keys, values = (x[batch, :, heads] for x in (q, k, v))
        queries = picked(some, rows, 0)  # (R, H, D)
        if scales is not None:  # keys without their center have the same weights
            queries = queries.float() * scales.levels.descale[heads, None]
        expected = expected_rows(queries, keys, values)
        out = self._attend(q, k, v, scales)
        self._expected.append(expected)
        self._made.append(out[batch, :, heads].index_select(0, rows))
        return out

    def _chosen(self, q: Tensor) -> tuple[Tensor, int, slice]:
        """Rows on the device, an element of the batch, heads as a slice; nothing waits for the device."""
        sample = len(self._made)
        if self._rows is None or sample % _CALLS == 0:
            self._rows = _drawn_rows(q.shape[1], q.device, self._step * 1_000_003 + sample)
        some = sorted(self._heads.choice(q.shape[2], min(SAMPLED_HEADS, q.shape[2]), replace=False).tolist())
        heads = slice(some[0], some[-1] + 1, max(some[-1] - some[0], 1))
        return self._rows[sample % _CALLS], sample % q.shape[0], heads


def _drawn_rows(length: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(low: int, columns: int) -> Tensor:
        return torch.randint(low, length, (_CALLS, columns), generator=generator, device=device)

    last = torch.full((_CALLS, 1), length - 1, device=device)
    return torch.cat([last, drawn(max(length - TILE_TOKENS, 0), 1), drawn(0, SAMPLED_ROWS - 2)], dim=1)


def expected_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v in fp32: q (R, H, D), k and v (S, H, D) -> (H, R, D)."""
    queries, keys, values = (x.transpose(0, 1) for x in (q, k, v))  # heads first
    queries = queries.float() * q.shape[-1] ** -0.5
    at_once = max(_FP32_BYTES // (4 * keys[0].numel()), 1)
    each = zip(*(x.split(at_once) for x in (queries, keys, values)), strict=True)
    parts = [_of_heads(*some) for some in each]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_heads(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(H, R, D) of scaled fp32 queries (H, R, D), keys and values (H, S, D)."""
    weights = (queries @ _fp32(keys).transpose(1, 2)).softmax(-1)  # (H, R, S)
    pieces = _pieces(keys.shape[1])
    weights = weights.unflatten(-1, (pieces, -1)).transpose(1, 2)  # (H, pieces, R, S/pieces)
    return (weights @ _fp32(values).unflatten(1, (pieces, -1))).sum(1)


def _fp32(x: Tensor) -> Tensor:
    """Heads one after the other, in one launch: as it is, a product would copy it first."""
    return x.to(torch.float32, memory_format=torch.contiguous_format)


@cache
def _pieces(count: int) -> int:
    """The most equal pieces, up to _MOST_PIECES, that `count` keys fall into."""
    return max(pieces for pieces in range(1, _MOST_PIECES + 1) if count % pieces == 0)


def _against(made: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """How far rows (..., R, D) are from the right ones, and what that is relative to; (..., R) fp32 each.

    To a row's own length or, where that is less, the average: a row whose values cancel out has the errors
    of its summands.
    """
    right = right.float()
    lengths = torch.linalg.vector_norm(right, dim=-1)
    errors = torch.linalg.vector_norm(made.float() - right, dim=-1)
    return errors, torch.maximum(lengths, lengths.mean(dim=-1, keepdim=True))


def _pairs(errors: Tensor, scales: Tensor) -> Tensor:
    """(samples, 2) of (samples, rows): the largest relative error, and whether its measure is not finite."""
    broken = ~torch.isfinite(scales).all(1)
    worst = (errors / scales.clamp_min(1e-30)).amax(1)
    return torch.stack([worst.masked_fill_(broken, 0.0), broken.float()], dim=1)


class KernelSample:
    """Looks at a few rows of blocks and of the head: what fused kernels and what their twins make of them.

    Outside of the attention, rows have nothing to do with each other. So a block runs once more on the rows
    alone, by the twins, with the attention's own result in the place of the attention: queries, keys, values
    and the block's change of its rows must be those that the kernels made. SAMPLED_BLOCKS of each forward,
    and every slice of the head.
    """

    def __init__(self, transformer: Transformer, attention: AttentionSample) -> None:
        self._count = 0
        self.begin(0)
        self._hooks: list[Any] = []
        self._attention = attention
        attention.kernels = self
        linear = transformer.get_submodule("blocks.0.self_attn.q")
        dtype = transformer.patch_embedding.weight.dtype
        rounded = isinstance(linear, QuantizedLinear) or attention.compact is not None
        bits = 8 if rounded else 8 * dtype.itemsize
        self.bound = KERNEL_BOUNDS[min(bits, 32)]
        for block in transformer.blocks.children():
            self._hooks.append(block.register_forward_pre_hook(self._begin_block))
            self._hooks.append(block.register_forward_hook(self._end_block))
            self._count += 1
        self._head = transformer.head
        self._hooks.append(self._head.register_forward_hook(self._end_head))

    def close(self) -> None:
        """Leave the transformer as it was."""
        self._attention.kernels = None
        for hook in self._hooks:
            hook.remove()

    def begin(self, step: int) -> None:
        """The forwards of a step begin: what was found before is forgotten."""
        self._step, self._calls = step, 0
        self._table: Tensor | None = None  # (_CALLS, SAMPLED_ROWS)
        self._rows: Tensor | None = None  # while a sampled block runs
        self._inputs: tuple[Any, ...] = ()
        self._entered: list[Tensor] = []
        self._mixed: Tensor | None = None
        self._found: list[tuple[Tensor, Tensor]] = []  # errors and scales of rows, (n, R) each
        self._of_head: list[tuple[Tensor, Tensor]] = []  # rows of its inputs and results, (B, R, ...) each
        self._rows_of_head: dict[int, Tensor] = {}  # by the length of a slice

    def numbers(self) -> Tensor:
        """(samples, 2) fp32 on the device, as for the attention.

        For each video of the batch: four of a block (queries, keys, values, its change), then the head's.
        """
        found = [*self._found, *self._head_found()]
        if not found:
            return torch.zeros(0, 2)
        return _pairs(*(torch.cat(rows) for rows in zip(*found, strict=True)))

    def entering(self, q: Tensor, k: Tensor, v: Tensor, scales: QKScales | None = None) -> None:
        """The attention of the block that runs begins."""
        if self._rows is None:
            return
        q, k, v = (picked(x, self._rows, 1) for x in (q, k, v))
        if scales is not None:
            q = restored(q, scales.levels.by_q).to(v.dtype)
            k = restored(k, scales.levels.by_k, scales.center[:, None]).to(v.dtype)
        self._entered = [q, k, v]

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
            with twins():
                expected = block.forward(*self._inputs)  # (B, R, D)
        finally:
            block.self_attn.mix = usual
        x, expected = self._inputs[0].float(), expected.float()
        errors = torch.linalg.vector_norm(result.index_select(1, self._rows).float() - expected, dim=-1)
        change, length = (torch.linalg.vector_norm(rows, dim=-1) for rows in (expected - x, x))
        self._found += [
            _against(torch.cat(self._entered).flatten(2), torch.cat(again).flatten(2)),
            (errors, change.add_(length, alpha=ROUNDINGS * torch.finfo(result.dtype).eps)),
        ]
        self._rows, self._mixed, self._entered, self._inputs = None, None, [], ()

    def _end_head(self, head: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        x, self._time_of_head = args
        count = x.shape[1]
        if count not in self._rows_of_head:  # slices of tokens come one after the other
            self._rows_of_head[count] = _drawn_rows(count, x.device, 29 + self._step)[0]
        rows = self._rows_of_head[count]
        self._of_head.append((x.index_select(1, rows), result.index_select(1, rows)))

    def _head_found(self) -> list[tuple[Tensor, Tensor]]:
        """All slices at once: the head stays on the device, where blocks may come and go."""
        if not self._of_head:
            return []
        inputs, results = (torch.stack(rows) for rows in zip(*self._of_head, strict=True))  # (n, B, R, ...)
        time = self._time_of_head.repeat(len(inputs), 1, 1)
        with twins():
            expected = self._head.forward(inputs.flatten(0, 1), time)
        return [_against(results.flatten(0, 1), expected)]
