"""Functions of single tokens, applied to a bounded number of tokens at a time.

Between the attentions every token of a video is treated by itself, so nothing but the tokens' own state must
exist for all of them at once: what lies in between (norms in fp32, the wide middle of a feed-forward) exists
for one slice. The numbers are those of one call for all tokens.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


def in_slices(
    f: Callable[..., Result], *inputs: Tensor, step: int | None, into: Tensor | None = None
) -> Result:
    """f(*inputs), computed for `step` tokens at a time; tokens are axis 1 of every input and every result.

    f maps tensors (B or 1, n, ...) to one tensor (B, n, ...) or a tuple of them and treats tokens
    independently. With `step` None, or no smaller than the number of tokens, it is called once, and gradients
    flow as usual. Otherwise one result goes to `into` where that is given (it may be one of the inputs, which
    is then overwritten, slice after slice); all others to new tensors.
    """
    count = inputs[0].shape[1]
    if step is None or step >= count:
        return f(*inputs)
    made: tuple[Tensor, ...] | None = None if into is None else (into,)
    alone = True
    for start in range(0, count, step):
        part = f(*(tensor[:, start : start + step] for tensor in inputs))
        alone = isinstance(part, Tensor)
        pieces = (part,) if isinstance(part, Tensor) else part
        if made is None:
            made = tuple(
                torch.empty((p.shape[0], count, *p.shape[2:]), dtype=p.dtype, device=p.device) for p in pieces
            )
        for whole, piece in zip(made, pieces, strict=True):
            whole[:, start : start + step] = piece
        del part, pieces
    assert made is not None  # there is at least one token
    return made[0] if alone else made  # type: ignore[return-value]
