"""Blocks of the text encoder computed again the slow way: kernels are checked on each prompt's own data.

Where they are wrong and finite, nothing later would tell: text states of any kind make a picture.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from runtime.guard import Fault
from runtime.kernels.launch import twins
from runtime.linear.module import QuantizedLinear
from runtime.samples import KERNEL_BOUNDS, ROUNDINGS
from runtime.text_encoder import Block, TextEncoder


class TextSample:
    """Looks at two blocks of `encoder` while it encodes: a context, then `fault`.

    The first two: the first has nothing to add to its input, all others do the same as the second. Each runs
    once more by the twins on the same input; what it adds to each token must be the same.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._blocks = [block for block in encoder.blocks.children() if isinstance(block, Block)][:2]
        rounded = any(isinstance(one, QuantizedLinear) for one in self._blocks[0].modules())
        bits = 8 if rounded else 8 * self._blocks[0].norm1.weight.dtype.itemsize
        self.bound = KERNEL_BOUNDS[min(bits, 32)]
        self._inputs: tuple[Any, ...] = ()
        self._distances: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for block in self._blocks:
            self._hooks.append(block.register_forward_pre_hook(self._begins))
            self._hooks.append(block.register_forward_hook(self._ends))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._inputs = ()

    def fault(self) -> Fault | None:
        """What was wrong, in words; None where nothing was. Waits for the device."""
        if not self._distances:
            return None
        off = float(torch.stack(self._distances).amax())
        if off <= self.bound:
            return None
        return Fault(f"a block of the text encoder is off by {off:.2f}, {self.bound:g} at most", "kernels")

    def _begins(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        # Copies: kernels write where they read.
        self._inputs = tuple(x.clone() if place < 2 and x is not None else x for place, x in enumerate(args))

    def _ends(self, block: nn.Module, args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> None:
        x, branch, *_ = self._inputs
        assert isinstance(block, Block)
        with twins():
            expected = _sum(*block.forward(*self._inputs))  # (B, L, D) fp32
        length = torch.linalg.vector_norm(expected, dim=-1)
        change = torch.linalg.vector_norm(expected - _sum(x, branch), dim=-1)
        errors = torch.linalg.vector_norm(_sum(*result) - expected, dim=-1)
        allowed = change.add_(length, alpha=ROUNDINGS * torch.finfo(x.dtype).eps)
        self._distances.append((errors / allowed.clamp_min_(1e-30)).amax())


def _sum(x: Tensor, branch: Tensor | None) -> Tensor:
    """The stream with what is still to be added to it, in fp32."""
    return x.float() if branch is None else x.float() + branch.float()
