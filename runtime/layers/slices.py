"""Functions of single tokens, applied to a bounded number of tokens at a time.

Between the attentions every token of a video is treated by itself, so nothing but the tokens' own state must
exist for all of them at once: what lies in between (norms in fp32, the wide middle of a feed-forward) exists
for one slice. The numbers are those of one call for all tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor

Places = Tensor | Sequence[Tensor] | None


@overload
def in_slices(f: Callable[..., Tensor], *inputs: Tensor, step: int | None, into: Places = None) -> Tensor: ...
@overload
def in_slices(
    f: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, step: int | None, into: Places = None
) -> tuple[Tensor, ...]: ...
def in_slices(f: Callable[..., Any], *inputs: Tensor, step: int | None, into: Places = None) -> Any:
    """f(*inputs), computed for `step` tokens at a time; tokens are axis 1 of every input and every result.

    f maps tensors (B or 1, n, ...) to one tensor (B, n, ...) or a tuple of them and treats tokens
    independently. With `step` None, or no smaller than the number of tokens, it is called once, and gradients
    flow as usual; `into` is not touched then. Otherwise the results go to `into` where that is given, one
    tensor for each (it may be an input, which is then overwritten slice after slice), else to new ones. Where
    `into` is several, f gets their slices as the keyword `into` and may write there itself: a result that
    lies there already is not copied.
    """
    count = inputs[0].shape[1]
    if step is None or step >= count:
        return f(*inputs)
    alone = True
    made: list[Tensor] = [] if into is None else [into] if isinstance(into, Tensor) else [*into]
    for start in range(0, count, step):
        places = [place[:, start : start + step] for place in made]
        there = {} if into is None or isinstance(into, Tensor) else {"into": places}
        part = f(*(tensor[:, start : start + step] for tensor in inputs), **there)
        alone = isinstance(part, Tensor)
        pieces = [part] if isinstance(part, Tensor) else [*part]
        for place in range(len(pieces)):
            piece = pieces[place]
            if place == len(made):
                made.append(piece.new_empty((piece.shape[0], count, *piece.shape[2:])))
            target = made[place][:, start : start + step]
            if not same_place(piece, target):
                target.copy_(piece)
        del part, piece, pieces, places, there, target  # before the next slice makes its own
    return made[0] if alone else tuple(made)


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and layout begin at the same memory; on meta there is none."""
    return not one.is_meta and one.data_ptr() == other.data_ptr()
