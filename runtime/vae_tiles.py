"""Decoding a frame at a time, and if need be a tile at a time: the same frames in less memory.

The decoder runs as steps of single frames that remember their past in rings of three (`Rings`): at 480x832 in
bf16 these rings are most of what a decode needs. They shrink with the picture, so a picture is cut into
tiles, one after the other, each through all its frames with rings of its own. Only the decoder's attention
sees the whole frame, and it stands before the first Upsample: everything up to the Upsample `split` runs once
for the whole picture, and its small features are kept for all latent frames; from there on a tile needs its
surroundings as far as the layers reach, and no more of them than each layer still needs
(`runtime/layers/tiles.py`). Tiles are exact: nothing is blended.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.layers.causal_conv import Rings
from runtime.layers.tiles import WHOLE, Rung, crops, spans
from runtime.layers.video_blocks import FrameStep, accumulation_dtype
from runtime.vae import VAE

Crop = tuple[slice, slice]


class Piece(NamedTuple):
    """A part of the decoded video: its frames and where they belong."""

    frames: Tensor  # (B, 3, 1 or 4, H', W') in [-1, 1], fp32 (float64 for such latents)
    first: int  # the number of its first frame in the video
    top: int  # pixels
    left: int


def decode_pieces(vae: VAE, latents: Tensor, rung: Rung = WHOLE) -> Iterator[Piece]:
    """Decode latents (B, 16, T, h, w), without gradients: yield the frames of each latent frame, by tiles.

    Pieces come in the order of time, whole pictures if there are no tiles. There are `rung.pieces(T, h, w)`
    of them, and together they are each pixel of the video once. Before the first, everything before the split
    is computed. What was handed out is not held here; dropping the iterator half way is fine.

    Raises:
        ValueError: at the call, for latents of a shape that the VAE cannot decode, or a split it does not
            have.
    """
    upsamples = len(vae.config.temporal_downsample)
    if rung.split is not None and not 0 <= rung.split < upsamples:
        raise ValueError(f"a split at Upsample {rung.split}, expected 0 to {upsamples - 1}")
    with torch.no_grad():
        z = vae.denormalise(latents)
    return _decode(vae, z, rung, accumulation_dtype(latents.dtype))


@torch.no_grad()
def _decode(vae: VAE, z: Tensor, rung: Rung, dtype: torch.dtype) -> Iterator[Piece]:
    size = z.shape[3], z.shape[4]
    grid = rung.grid(*size)
    scale = vae.config.spatial_scale * size[0] // grid[0]  # pixels of the video for each of the tiles' grid
    first, steps = vae.decoder.frame_steps(rung.split)
    # What each latent frame is when it enters `steps`: itself, or the features (B, C, h', w') at the split.
    chunks = [[frame] for frame in z.unbind(2)]
    del z
    if first:
        chunks = _before_the_split(first, chunks)
    for tile in rung.tiles(*size):
        down, across = (crops(spans(part, n, steps), steps) for part, n in zip(tile, grid, strict=True))
        top, left = (part.start * scale for part in tile)
        number = 0
        for frames in _decode_tile(steps, [*zip(down, across, strict=True)], chunks, dtype):
            yield Piece(frames, number, top, left)
            number += frames.shape[2]
            del frames


def _before_the_split(steps: Sequence[FrameStep], chunks: list[list[Tensor]]) -> list[list[Tensor]]:
    """The features at the split, (B, C, h', w') each, that every latent frame becomes."""
    rings = Rings()
    everything = [(slice(None), slice(None))] * (len(steps) + 1)
    return [[y for x in chunk for y in _run(steps, everything, x, rings)] for chunk in chunks]


def _decode_tile(
    steps: Sequence[FrameStep],
    where: Sequence[Crop],
    chunks: list[list[Tensor]],
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yield the frames (B, 3, 1 or 4, H', W') of each latent frame, in one place of the picture."""
    rings = Rings()
    for chunk in chunks:
        decoded = [
            frame.to(dtype, memory_format=torch.contiguous_format).clamp_(-1, 1)
            for x in chunk
            for frame in _run(steps, where, x, rings)
        ]
        frames = torch.stack(decoded, dim=2)
        del decoded
        yield frames
        del frames


def _run(steps: Sequence[FrameStep], where: Sequence[Crop], x: Tensor, rings: Rings) -> Iterator[Tensor]:
    """Yield all frames that the steps make of one frame x (B, C, H, W), in order.

    Where a step makes two, the first goes through the rest before the second does: at any moment there is one
    frame at the finest size. `where` is what to keep before each step, and of the last one's output.
    """
    pending = [(0, x)]
    del x
    while pending:
        number, frame = pending.pop()
        rows, columns = where[number]
        frame = frame[:, :, rows, columns]
        if number == len(steps):
            yield frame
            continue
        outputs = steps[number].run(frame, rings)
        del frame  # the outputs alone are alive when the next step begins
        pending += [(number + 1, output) for output in reversed(outputs)]
        del outputs
