"""Convolution over time that never looks ahead, and what it remembers between the chunks of a video.

A causal convolution sees, for each frame, that frame and the two before it; before a video there are zeros.
So a video may be processed whole, or in chunks of frames as long as each layer gets the last frames of what
it saw before. Both are one code path here: the input is preceded by its past, and the past is zeros unless a
`History` says otherwise. The history is an object of the caller's, made for one pass over one video and
handed down through the forwards. Modules hold no state: passes may interleave or break off.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


class History:
    """What the layers remember from chunk to chunk, in one pass over one video.

    `started` is False while the first chunk runs: the first frame of a video is treated apart by the layers
    that change the frame rate.
    """

    def __init__(self) -> None:
        self.started = False
        self._frames: dict[nn.Module, Tensor] = {}

    def recall(self, layer: nn.Module) -> Tensor | None:
        """The last input frames of `layer`, (B, C, n, H, W), or None when it has seen none."""
        return self._frames.get(layer)

    def remember(self, layer: nn.Module, x: Tensor, frames: int) -> None:
        """Keep the last `frames` frames of x (B, C, T, H, W) for `layer`, in place of what it had."""
        # A copy: a slice would keep the whole chunk alive.
        self._frames[layer] = x[:, :, -frames:].clone()


class CausalConv3d(nn.Conv3d):
    """Convolution whose frame t depends on the input's frames t-2, t-1 and t; frames and size stay the same.

    Args:
        kernel: odd extents over (time, height, width). Height and width are padded with zeros on both sides,
            time on the left alone.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        time, height, width = kernel
        super().__init__(dim_in, dim_out, kernel, padding=(0, height // 2, width // 2))
        self.reach = time - 1

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """x (B, C_in, T, H, W) -> (B, C_out, T, H, W), in either form.

        Args:
            history: None when x is the whole video; otherwise x is its next chunk.
        """
        past = None if history is None else history.recall(self)
        if past is None:
            past = x.new_zeros(x.shape[0], x.shape[1], self.reach, *x.shape[3:])
        x = torch.cat([past, x], dim=2)  # (B, C_in, reach + T, H, W)
        if history is not None:
            history.remember(self, x, self.reach)
        return super().forward(x)


class CausalSequential(nn.Sequential):
    """A sequence of per-frame layers and `CausalConv3d`s; the latter get the history."""

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """x (B, C, T, H, W) through all layers in order."""
        for layer in self:
            x = layer(x, history) if isinstance(layer, CausalConv3d) else layer(x)
        return x


def run_in_chunks(run: Callable[[Tensor, History], Tensor], chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield `run(chunk, history)` for the consecutive chunks of one video, with one fresh history.

    No result is held here after it has been handed out.
    """
    history = History()
    for chunk in chunks:
        yield run(chunk, history)
        history.started = True
