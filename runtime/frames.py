"""Latents to frames: a decode, piece by piece, into one video of bytes that is checked as it grows."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from runtime.guard import check_decoded, check_frames
from runtime.layers.tiles import WHOLE, Rung
from runtime.vae import VAE
from runtime.vae_tiles import Piece, decode_pieces


class Decoding:
    """One decode of latents (1, 16, T, h, w). Iterate over it, which does the work; then `frames` is whole.

    `pieces` is how often the iteration yields, `nbytes` what there is of the video so far, and `whole` how
    many of its frames, from the first on, have all their pixels: these change no more. Where tiles cut the
    picture, no frame is whole before the last tile comes to it.

    On a GPU the frames of a piece are fetched, by a stream of their own, when the next piece has been begun:
    so the GPU never waits for the copy, nor for the many small kernels that a piece begins with.
    """

    def __init__(self, vae: VAE, latents: Tensor, rung: Rung = WHOLE) -> None:
        self._vae, self._rung, self._latents = vae, rung, latents
        self.nbytes = self.whole = 0
        _, _, count, height, width = latents.shape
        self.pieces = rung.pieces(count, height, width)
        space, time = vae.config.spatial_scale, vae.config.temporal_scale
        shape = ((count - 1) * time + 1, height * space, width * space, 3)
        self.frames = np.empty(shape, dtype=np.uint8)  # (F, H, W, 3)
        self._missing = [height * space * width * space] * shape[0]  # pixels of each frame

    def __iter__(self) -> Iterator[int]:
        """The number of pieces done, after each. Raises OutputCheckError for pixels that are not finite."""
        pieces, done = iter(decode_pieces(self._vae, self._latents, self._rung)), 0
        side = torch.cuda.Stream(self._latents.device) if self._latents.is_cuda else None
        waiting: _Fetch | None = None
        running = True
        while running:
            # Entered for each piece: whoever takes its number is not in inference mode.
            with torch.inference_mode():
                piece = next(pieces, None)
                running = piece is not None
                begun = None if piece is None else _Fetch(piece, side)
                del piece
                ready = waiting if side is not None else begun
                waiting = begun
                del begun
                if ready is not None:
                    self._place(ready)
            if ready is not None:
                del ready
                done += 1
                yield done
        check_frames(self.frames, self._latents)

    def _place(self, fetch: "_Fetch") -> None:
        """Put a piece's bytes where they belong."""
        pixels = fetch.pixels()
        count, height, width, _ = pixels.shape
        first, top, left = fetch.first, fetch.top, fetch.left
        self.frames[first : first + count, top : top + height, left : left + width] = pixels
        self.nbytes += pixels.nbytes
        for number in range(first, first + count):
            self._missing[number] -= height * width
        while self.whole < len(self._missing) and not self._missing[self.whole]:
            self.whole += 1


class _Fetch:
    """A piece as bytes, on its way to the CPU by the stream `side` if there is one; its floats are gone."""

    def __init__(self, piece: Piece, side: torch.cuda.Stream | None) -> None:
        frames, self.first, self.top, self.left = piece
        self._bytes = frames_to_bytes(frames[0])
        # One reduction tells whether all are finite, since they lie between -1 and 1.
        self._sum = frames.sum(dtype=torch.promote_types(frames.dtype, torch.float32))
        self._side = side
        self._made = None if side is None else torch.cuda.current_stream(frames.device).record_event()

    def pixels(self) -> np.ndarray:
        """uint8 (F, H, W, 3). Raises OutputCheckError for pixels that are not finite."""
        if self._side is not None and self._made is not None:
            self._side.wait_event(self._made)
        with torch.cuda.stream(self._side):  # waits for this piece alone, not for the next
            check_decoded(self._sum.cpu(), self.first)
            array: np.ndarray = self._bytes.cpu().numpy()
        return array


def frames_to_bytes(frames: Tensor) -> Tensor:
    """Frames (3, F, H, W), float in [-1, 1] -> uint8 (F, H, W, 3) where they are, clamped and rounded.

    The same bytes as those of `runtime.video.frames_to_uint8`; nothing but bytes has to leave a GPU.
    """
    levels = frames.float().add(1).mul_(127.5).round_().clamp_(0, 255)
    pixels = torch.empty((*frames.shape[1:], 3), dtype=torch.uint8, device=frames.device)
    pixels.permute(3, 0, 1, 2).copy_(levels)  # the conversion and the order of pixels at once
    return pixels
