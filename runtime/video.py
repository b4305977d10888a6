"""Frames become a file that plays everywhere, or no file at all.

H.264 High in mp4, yuv420p, limited range, BT.709 (both the tags and the arithmetic: players assume 601 for
small videos that do not say), index at the front. The file says how it was made: the prompt as its title, the
whole record as JSON in its comment. How it is encoded and gets its name: `runtime/video_writer.py`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from runtime.errors import OutputError, RequestError
from runtime.video_writer import QUEUED, VideoWriter, check_output, output_errors, whole_output

if TYPE_CHECKING:
    import torch

__all__ = ["Video", "check_output", "contact_sheet", "frames_to_uint8", "read_frames", "read_metadata"]

RECORD_FORMAT = 1
"""Of the record in a video's comment (`Pipeline` writes it, `t2v rerun` reads it): one more for each change
that an older program would misread. A record without "format" is of the first."""

MAX_RECORD_CHARACTERS = 1 << 20
"""Of a record that is read: one is a few KiB, of which the prompt and the list of files are the most."""

SHEET_TILES, SHEET_TILE_WIDTH, SHEET_GAP, SHEET_GREY = 16, 320, 4, 64
"""Of a contact sheet: tiles at most, pixels at least, pixels between, and their level."""


@dataclass
class Video:
    """A finished video: frames uint8 (F, H, W, 3) in RGB, frames per second, and how it was made."""

    frames: np.ndarray
    fps: int = 16
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.frames.shape
        if self.frames.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise RequestError(f"frames are {self.frames.dtype} {shape}; expected uint8 (F, H, W, 3).")
        if shape[1] % 2 or shape[2] % 2:
            raise RequestError(f"frames are {shape[1]}x{shape[2]}; expected even height and width.")

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        writer: VideoWriter | None = None,
        on_frames: Callable[[int], None] | None = None,
    ) -> Path:
        """Write an mp4 to `path`, creating directories on the way; returns where it is.

        `writer` has begun with these frames, for a `path` in the same directory: it gets those that it lacks.
        on_frames(n) is told now and then that the encoder has n of them. Raises OutputError when the path
        cannot be used or the disk is full; then nothing is left behind.
        """
        path, (_, height, width, _) = Path(path), self.frames.shape
        with writer or VideoWriter(path, height, width, self.fps, overwrite) as writer, output_errors(path):
            _encode(self, writer, on_frames)
            return writer.close(self.metadata, path)


def frames_to_uint8(frames: "torch.Tensor | np.ndarray") -> np.ndarray:
    """Frames (3, F, H, W), float in [-1, 1] -> uint8 (F, H, W, 3), clamped, on the CPU.

    Rounded to the nearest level in fp32. Upstream truncates in the tensor's own precision: that darkens the
    video by half a level and, in bf16, merges neighbouring levels of the brighter half.
    """
    if isinstance(frames, np.ndarray):
        levels = np.rint((frames.astype(np.float32) + 1) * 127.5).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 3, 0))
    on_device = frames.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte()
    array: np.ndarray = on_device.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return array


def _encode(video: Video, writer: VideoWriter, on_frames: Callable[[int], None] | None) -> None:
    """Hand `writer` the frames that it lacks."""
    if writer.fps != video.fps:
        raise ValueError(f"a writer at {writer.fps} fps for a video at {video.fps}")
    while writer.count < video.frames.shape[0]:
        writer.add(video.frames[writer.count : writer.count + QUEUED])
        if on_frames is not None:
            on_frames(writer.count)


# ----------------------------------------------------------------------------------------------- reading


def read_frames(path: str | Path) -> np.ndarray:
    """All frames of a video, uint8 (F, H, W, 3) in RGB. RequestError when it cannot be read."""
    with _opened(path) as container:
        frames = [
            frame.reformat(
                format="rgb24",
                src_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
            ).to_ndarray()
            for frame in container.decode(video=0)
        ]
    if not frames:
        raise RequestError(f"{path} holds no frames; expected a video.")
    return np.stack(frames)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """How the video at `path` was made, as `Video.metadata` had it. RequestError when it does not say."""
    with _opened(path) as container:
        comment = container.metadata.get("comment", "")
    if len(comment) > MAX_RECORD_CHARACTERS:
        raise RequestError(
            f"{path} has a comment of {len(comment)} characters; expected the record of this program."
        )
    try:
        metadata = json.loads(comment)
    except (ValueError, RecursionError) as error:  # no JSON, a number of 5000 digits, brackets without end
        raise RequestError(
            f"{path} does not say how it was made; expected a video of this program."
        ) from error
    if not isinstance(metadata, dict):
        raise RequestError(f"{path} has the comment {comment[:60]!r}; expected the record of this program.")
    return metadata


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    try:
        # The format is not left to be guessed: a playlist that calls itself mp4 would open what it lists.
        with av.open(str(path), format="mp4", metadata_errors="replace") as container:
            if not container.streams.video:
                raise RequestError(f"{path} holds no video; expected an mp4 file.")
            yield container
    except (OSError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{path} cannot be read as a video ({reason}); expected an mp4 file.") from error


# ----------------------------------------------------------------------------------------- contact sheet


def contact_sheet(frames: np.ndarray, path: str | Path, columns: int | None = None) -> Path:
    """A PNG of up to SHEET_TILES frames, evenly chosen from first to last, row by row; replaces `path`.

    frames: uint8 (F, H, W, 3). Small ones are enlarged and large ones reduced by a whole factor.
    Raises OutputError when it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise OutputError(f"The contact sheet {path} ends in {path.suffix!r}; expected .png.")
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), SHEET_TILES)).round().astype(int)
    tiles = [_tile(frames[index]) for index in chosen]
    height, width, _ = tiles[0].shape
    columns = min(columns or -(-len(tiles) // max(1, round(len(tiles) ** 0.5))), len(tiles))
    rows = -(-len(tiles) // columns)
    step_y, step_x = height + SHEET_GAP, width + SHEET_GAP
    sheet = np.full((rows * step_y - SHEET_GAP, columns * step_x - SHEET_GAP, 3), SHEET_GREY, np.uint8)
    for place, tile in enumerate(tiles):
        y, x = place // columns * step_y, place % columns * step_x
        sheet[y : y + height, x : x + width] = tile
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_output(path, overwrite=True) as part:
        part.write_bytes(_png(sheet))
    return path


def _tile(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) enlarged by repeating pixels or reduced by averaging whole squares of them."""
    height, width, _ = frame.shape
    if width < SHEET_TILE_WIDTH:
        factor = -(-SHEET_TILE_WIDTH // width)
        return frame.repeat(factor, axis=0).repeat(factor, axis=1)
    factor = max(1, width // SHEET_TILE_WIDTH)
    cut = frame[: height // factor * factor, : width // factor * factor]
    squares = cut.reshape(height // factor, factor, width // factor, factor, 3)
    mean: np.ndarray = squares.mean(axis=(1, 3)).round().astype(np.uint8)
    return mean


def _png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG file."""
    height, width, _ = pixels.shape
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt = width, height, "rgb24"
    context.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
