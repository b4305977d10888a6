"""Frames become a file that plays everywhere, or no file at all.

H.264 High in mp4, yuv420p, limited range, BT.709 (both the tags and the arithmetic: players assume 601 for
small videos that do not say), index at the front. The file says how it was made: the prompt as its title, the
whole record as JSON in its comment. It is written under a hidden name beside its own and renamed when it is
whole and on the disk, so a name that exists is a video that plays.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from runtime.errors import OutputError, RequestError

if TYPE_CHECKING:
    import torch

CRF = 18
"""x264's constant quality, visually lossless; its default, 23, blurs the fine grain of a generated video."""

THREADS = 4
X264 = "mbtree=0:lookahead-threads=1"
"""The same frames give the same file. x264's output depends on the number of threads, so that is fixed; its
macroblock tree gave other bytes in about one run of ten (with its SIMD code alone), so that is off."""

BT709 = 1  # number of the matrix, primaries and transfer in the H.264 and mp4 standards
LIMITED_RANGE = 1

RECORD_FORMAT = 1
"""Of the record in a video's comment (`Pipeline` writes it, `t2v rerun` reads it): one more for each change
that an older program would misread. A record without "format" is of the first."""

MAX_RECORD_CHARACTERS = 1 << 20
"""Of a record that is read: one is a few KiB, of which the prompt and the list of files are the most."""

MIN_FREE = 8 << 20
"""Bytes that must be free before a run: an 81-frame 480p video takes 1 to 5 MB."""

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

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write an mp4 to `path`, creating directories on the way; returns where it is.

        Raises OutputError when the path cannot be used or the disk is full; then nothing is left behind.
        """
        path = check_output(path, overwrite)
        with _whole_file(path, overwrite) as part:
            _encode(self, part)
            _check_complete(part, len(self.frames))
        return path


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


# ------------------------------------------------------------------------------------------ output paths


def check_output(path: str | Path, overwrite: bool = False, need: int = MIN_FREE) -> Path:
    """Refuse an output path that will fail, before minutes are spent on its video; creates its directory.

    Raises OutputError: not .mp4, a directory, there already, its directory not writable, less than `need`
    bytes free. Returns the path with ~ expanded.
    """
    path = Path(path)
    try:
        path = path.expanduser()
        if path.is_dir():
            raise OutputError(
                f"The output {path} is a directory; expected a file, like {path / 'video.mp4'}."
            )
        if path.suffix.lower() != ".mp4":
            raise OutputError(f"The output {path} ends in {path.suffix!r}; expected .mp4.")
        _refuse_existing(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _part(path)
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(path.parent).free
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user for ~user
        raise OutputError(_os_sentence(path, error)) from error
    if free < need:
        raise OutputError(
            f"The disk of {path} has {free / 2**20:.1f} MiB free; expected at least {need / 2**20:.1f} MiB: "
            "free some space, or name another disk with --output."
        )
    return path


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise OutputError(f"The output {path} exists; name another file, or pass --overwrite to replace it.")


def _part(path: Path) -> Path:
    """Where `path` grows: hidden, beside it (a rename must not cross disks), with its format's suffix."""
    return path.with_name(f".{path.stem[:40]}.part-{os.getpid()}{path.suffix.lower()}")


@contextmanager
def _whole_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the hidden name to write; then sync and rename it, or remove it whatever went wrong."""
    part = _part(path)
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        _refuse_existing(path, overwrite)  # another process may have been faster
        part.replace(path)
    except (OSError, av.FFmpegError) as error:
        part.unlink(missing_ok=True)
        raise OutputError(_os_sentence(path, error)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _os_sentence(path: Path, error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {path} is full; free some space, or name another disk with --output."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = os.strerror(number).lower()
        return f"The output {path} cannot be written ({reason}); expected a writable directory: name another."
    reason = getattr(error, "strerror", None) or str(error)
    return f"The output {path} could not be written ({reason}); nothing was left there."


# ---------------------------------------------------------------------------------------------- encoding


def _encode(video: Video, part: Path) -> None:
    """Write the whole mp4 to `part`."""
    _, height, width, _ = video.frames.shape
    with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["title"] = _title(video.metadata)
        # Half a surrogate pair has no UTF-8; written with a backslash it is the same text to JSON.
        comment = json.dumps(video.metadata, ensure_ascii=False, default=str)
        container.metadata["comment"] = comment.encode("utf-8", "backslashreplace").decode()
        options = {
            "crf": str(CRF),
            "preset": "medium",
            "profile": "high",
            "x264-params": X264,
        }
        stream = container.add_stream("libx264", rate=Fraction(video.fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = THREADS
        context.gop_size = 2 * video.fps  # a key frame every two seconds, so that players can jump
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        for index, pixels in enumerate(video.frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts = index
            frame.time_base = Fraction(1) / Fraction(video.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _title(metadata: dict[str, Any]) -> str:
    """The prompt on one line, without control characters, at most 200 characters."""
    words = " ".join(str(metadata.get("prompt", "")).split())
    return "".join(letter for letter in words if letter.isprintable())[:200]


def _check_complete(part: Path, frames: int) -> None:
    """Count what the file holds: a disk that fills up at the very end is not always reported by the muxer."""
    with av.open(str(part)) as container:
        packets = sum(1 for packet in container.demux(video=0) if packet.size)
    if packets != frames:
        raise OSError(errno.ENOSPC, f"{packets} of {frames} frames were written")


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(_os_sentence(path, error)) from error
    with _whole_file(path, overwrite=True) as part:
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
