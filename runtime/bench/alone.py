"""The operations of a forward, each alone: what it asked for is recorded, then made again of random numbers.

Nothing about the model's inside is assumed: a hook on every linear of the blocks and a wrapper around both
attentions write down the shapes and how often they came. Random numbers, as zeros would run faster.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runtime.bench.clock import Run
from runtime.bench.following import restored
from runtime.bench.sizes import Mix, Product, Work
from runtime.kernels.attention_quantize import rotated, to_eight_bits
from runtime.kernels.prepared import Prepared
from runtime.kernels.row_quantize import row_quantize
from runtime.layers.attention import Attend
from runtime.layers.backends import BACKENDS, named
from runtime.layers.compact_qk import MixCompact, QKScales, compact_of, levels_of
from runtime.linear.module import QuantizedLinear
from runtime.linear.quantize import quantize_weight
from runtime.transformer import Transformer


@contextmanager
def recording(model: Transformer) -> Iterator[Work]:
    """What the blocks of `model` are asked for inside; the work is whole at the end of the block."""
    work = Work(Counter(), Counter(), Counter())
    with ExitStack() as stack:
        blocks = stack.enter_context(restored(model))
        for block in blocks:
            for linear in linears(block):
                stack.callback(linear.register_forward_pre_hook(_hook(work.products)).remove)
        first = blocks[0]
        model.use_attention(
            _Counted(first.self_attn.mix, work.of_tokens), _Counted(first.cross_attn.mix, work.on_text)
        )
        yield work


def linears(block: nn.Module) -> list[nn.Module]:
    """Those that hold a matrix of the block."""
    return [one for one in block.modules() if isinstance(one, (nn.Linear, QuantizedLinear))]


def _hook(counts: Counter[Product]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def count(linear: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0]
        prepared = isinstance(x, Prepared)
        values: Tensor = x.values if prepared else x
        depth = values.shape[-1]
        assert isinstance(linear, (nn.Linear, QuantizedLinear))
        counts[Product(values.numel() // depth, linear.out_features, depth, prepared)] += 1

    return count


class _Counted:
    """An attention that counts its calls, in the form in which they come."""

    def __init__(self, attend: Attend, counts: Counter[Mix]) -> None:
        self._attend, self._counts, self._attend_compact = attend, counts, compact_of(attend)
        self.compact: MixCompact | None = None if self._attend_compact is None else self._of_compact

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._count(q, k)
        return self._attend(q, k, v)

    def _of_compact(self, q8: Tensor, k8: Tensor, v: Tensor, scales: QKScales) -> Tensor:
        assert self._attend_compact is not None
        self._count(q8, k8)
        return self._attend_compact(q8, k8, v, scales)

    def _count(self, q: Tensor, k: Tensor) -> None:
        self._counts[Mix(q.shape[1], k.shape[1], q.shape[2], q.shape[3])] += 1


# --- made again ---


def product(one: Product, like: nn.Module, dtype: torch.dtype, device: torch.device) -> Run:
    """This product with random rows of `dtype` and a random matrix of the kind of `like`."""
    linear = random_linear(one.columns, one.depth, like, dtype, device)
    x: Tensor | Prepared = _random((one.rows, one.depth), dtype, device, seed=one.rows)
    if one.prepared:
        assert isinstance(x, Tensor) and isinstance(linear, QuantizedLinear)
        x = Prepared(*row_quantize(x, linear.form.dtype), dtype)
    return lambda: linear(x)


def random_linear(
    columns: int, depth: int, like: nn.Module, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A linear of the class of `like` with random numbers, which keep the size of what they multiply."""
    matrix = _random((columns, depth), dtype, device, seed=columns + depth).mul_(depth**-0.5)
    linear: nn.Module
    if isinstance(like, QuantizedLinear):
        linear = type(like)(depth, columns, like.bias is not None, device)
        linear.weight, linear.weight_scale = quantize_weight(matrix, like.form)
        if like.bias is not None:
            linear.bias = _random((columns,), like.bias.dtype, device, seed=columns)
    else:
        linear = nn.Linear(depth, columns, device=device, dtype=dtype)
        linear.weight.data = matrix
    return linear.requires_grad_(False)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, dtype=dtype, generator=generator)


def mix(one: Mix, name: str, dtype: torch.dtype, device: torch.device) -> Run:
    """This attention of random queries, keys and values by a backend, in the form that a run has for it."""
    q, k, v = (
        _random((1, count, one.heads, one.width), dtype, device, seed)
        for seed, count in enumerate((one.tokens, one.keys, one.keys))
    )
    compact = BACKENDS[name].compact
    if compact is not None and one.tokens == one.keys:
        return partial(compact, *_compacted(q, k, v), one.width**-0.5, torch.empty_like(v))
    return partial(named(name, device), q, k, v, one.width**-0.5)


def _compacted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, QKScales]:
    """What compact attention takes of rows that are as if a norm without weights had made them."""
    heads, width = q.shape[2:]
    weight = torch.ones(heads * width, device=q.device)
    levels, mean = levels_of(weight, weight, heads), k.mean(1, dtype=torch.float32)  # (1, H, D)
    by_q, by_k = (by[:, None].expand_as(mean[0]) * width**0.5 for by in (levels.by_q, levels.by_k))
    q8 = to_eight_bits(q, torch.zeros_like(mean[0]), by_q, rotate=True)
    k8 = to_eight_bits(k, mean[0], by_k, rotate=True)
    return q8, k8, v, QKScales(levels, rotated(mean))


def copy(nbytes: int, device: torch.device) -> Run:
    """A copy of `nbytes` within the device's memory: so many read, so many written."""
    source = _random((nbytes // 4,), torch.float32, device, seed=1)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_from_host(nbytes: int, device: torch.device) -> Run:
    """A copy of `nbytes` of pinned RAM to a GPU."""
    source = torch.randn(nbytes // 4).pin_memory()
    target = torch.empty(nbytes // 4, device=device)
    return lambda: target.copy_(source, non_blocking=True)
