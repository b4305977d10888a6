"""The operations of a forward, each alone: what it asked for is recorded, then made again of random numbers.

Nothing about the model's inside is assumed: a hook on every linear of the blocks and a wrapper around both
attentions write down the shapes and how often they came. Random numbers, as zeros would run faster.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from runtime.bench.clock import Run
from runtime.bench.following import restored
from runtime.bench.sizes import Mix, Product, Work
from runtime.kernels.prepared import Prepared
from runtime.kernels.row_quantize import row_quantize
from runtime.layers.attention import Attend
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
            _counted(first.self_attn.mix, work.of_tokens), _counted(first.cross_attn.mix, work.on_text)
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


def _counted(attend: Attend, counts: Counter[Mix]) -> Attend:
    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        counts[Mix(q.shape[1], k.shape[1], q.shape[2], q.shape[3])] += 1
        return attend(q, k, v)

    return counted


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


def mix(one: Mix, attend: Attend, dtype: torch.dtype, device: torch.device) -> Run:
    """This attention of random queries, keys and values."""
    q, k, v = (
        _random((1, count, one.heads, one.width), dtype, device, seed)
        for seed, count in enumerate((one.tokens, one.keys, one.keys))
    )
    return lambda: attend(q, k, v)


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
