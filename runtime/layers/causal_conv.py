"""Convolution over time that never looks ahead, and what it remembers between the parts of a video.

A causal convolution sees, for each frame, that frame and the two before it; before a video there are zeros.
So a video may be processed whole, or in parts as long as each layer has the last frames of what it saw
before. What is remembered belongs to the caller, who makes it for one pass over one video and hands it down.
Modules hold no state: passes may interleave or break off. There are two forms of it:

- `History`, for chunks of any number of frames, with gradients where they are wanted: the input is preceded
  by its past, and the past is zeros unless the history says otherwise.
- `Rings`, for one frame at a time and little memory, without gradients: each convolution has a buffer of as
  many frames as it sees. Its next input frame is written over the oldest one by whoever computes it, and the
  weights are turned to the order in which the frames lie. No frame is ever moved, joined or copied.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
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


class Rings:
    """What the layers remember from frame to frame, in one pass over one video."""

    def __init__(self) -> None:
        self._rings: dict[nn.Module, _Ring] = {}
        self._begun: set[nn.Module] = set()
        self._made: dict[nn.Module, Tensor] = {}

    def begins(self, layer: nn.Module) -> bool:
        """Whether `layer` asks for the first time: then its frame is the video's first."""
        first = layer not in self._begun
        self._begun.add(layer)
        return first

    def once(self, layer: nn.Module, make: Callable[[], Tensor]) -> Tensor:
        """What `layer` makes of its weights, made at the first call and kept for the pass."""
        if layer not in self._made:
            self._made[layer] = make()
        return self._made[layer]

    def slot(self, conv: "CausalConv3d", like: Tensor) -> Tensor:
        """Where the next input frame of `conv` is to be written: a view (B, C, H, W), as `like` is."""
        if conv not in self._rings:
            self._rings[conv] = _Ring(conv, like)
        return self._rings[conv].turn()

    def convolve(self, conv: "CausalConv3d", bias: bool = True) -> Tensor:
        """The output frame (B, C_out, H, W) of `conv` for the input frame that was written last.

        Args:
            bias: False leaves the bias out, for a caller that adds it on the way to something else.
        """
        return self._rings[conv].convolve(conv.bias if bias else None)


class _Ring:
    """The last input frames of one convolution, as many as it sees; zeros where the video had not begun.

    The frames lie side by side as channels, (frames x channels) to a pixel, and a pixel's channels together:
    so cuDNN's convolutions are the fastest. On an H200 13 frames of 480x832 took 0.206 s; 0.218 s as
    convolutions of three dimensions; with channels first 0.239 and 0.259 s.
    """

    def __init__(self, conv: "CausalConv3d", like: Tensor) -> None:
        batch, channels, *size = like.shape
        frames = conv.reach + 1
        shape = (batch, frames * channels, *size)
        layout = torch.channels_last
        self.buffer = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout).zero_()
        self.newest = frames - 1
        self.padding = conv.padding[1:]
        # Views made once: with small tiles the decode waits for Python, not for the card.
        self.slots = self.buffer.split(channels, dim=1)
        self.turned = [_turned(conv.weight, newest) for newest in range(frames)]

    def turn(self) -> Tensor:
        """The place of the next frame, a view (B, C, H, W) of the buffer: the oldest frame's."""
        self.newest = (self.newest + 1) % len(self.slots)
        return self.slots[self.newest]

    def convolve(self, bias: Tensor | None) -> Tensor:
        weight = torch.cat(self.turned[self.newest], dim=3).flatten(3).permute(0, 3, 1, 2)
        return F.conv2d(self.buffer, weight, bias, padding=self.padding)


def _turned(weight: Tensor, newest: int) -> list[Tensor]:
    """Parts (O, h, w, n, C) of weight (O, C, frames, h, w), to be joined along n: as the frames lie.

    The newest frame, in slot `newest`, meets the last weights, the one before it the last but one, and so on
    around the ring. In the order of the layout that is wanted, so that joining them is the only copy.
    """
    ordered = weight.permute(0, 3, 4, 2, 1)
    frames = ordered.shape[3]
    first = (frames - 1 - newest) % frames  # whose weights the frame in slot 0 meets
    parts = [ordered.narrow(3, first, frames - first), ordered.narrow(3, 0, first)]
    return [part for part in parts if part.shape[3]]


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

    def next_frame(self, x: Tensor, rings: Rings) -> Tensor:
        """The video's next frame x (B, C_in, H, W) -> (B, C_out, H, W)."""
        rings.slot(self, x).copy_(x)
        return rings.convolve(self)


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
