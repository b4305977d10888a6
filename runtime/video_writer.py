"""An mp4 that is encoded while its frames are still being made, and is a file only when it is whole.

x264 works on a thread of its own, so a decode and the encoding of what it has given go on at once:

    with VideoWriter(path, height, width, fps) as writer:
        for pixels in decoded:  # uint8 (n, H, W, 3), whole pictures in the order of time
            writer.add(pixels)
        writer.close(metadata)  # how it was made, which is known only now

`offer` takes what there is room for and never waits, for a decode that keeps a GPU busy; `Video.save` adds
what its writer lacks. A decode that begins again in another way calls `restart` first: its pixels may differ.

Nothing is on the disk before `close`. What x264 gives, a hundredth of the frames' size, waits in memory for
the record that stands before it in the file. Then the file is written under a hidden name beside its own and
renamed when it is whole and on the disk, so a name that exists is a video that plays.

A writer of W x H frames takes, whatever their number,

    ENCODER_BASE + (ENCODER_PIXEL + 3 * QUEUED) * W * H  bytes, and as many as its file will have

(0.09 GB at 480x832, 0.19 GB at 720x1280). 3 * QUEUED are the caller's own frames, which cost nothing where
the caller keeps them all.
"""

import errno
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from runtime.errors import OutputError, RequestError

CRF, PRESET = 16.5, "veryfast"
"""x264's constant quality and effort: visually lossless (its default, 23, blurs the fine grain of a generated
video) in half the time of "medium" at 18, for a third more bytes. PSNR of luma and bytes against those, by
content: a photograph panned +0.4 dB, +35 %; with grain +0.9 dB, +25 %; the demo +0.7 dB, +31 %; smooth
synthetic motion -0.7 dB (at 50 dB), +25 %. At equal size: -1.0, +0.2, -0.4, -1.5 dB."""

THREADS = 4
X264 = "chroma-qp-offset=-2:mbtree=0:lookahead-threads=1"
"""The same frames give the same file on any number of cores. x264's output depends on the number of threads,
so that is fixed; its macroblock tree gave other bytes in about one run of ten (with its SIMD code alone), so
that is off, and with it a lookahead of 10 to 40 frames. The offset gives colours the share of the bits that
slower presets give them."""

BT709 = 1  # number of the matrix, primaries and transfer in the H.264 and mp4 standards
LIMITED_RANGE = 1

QUEUED = 16
"""Frames that wait for x264 at most; then `VideoWriter.add` does."""

ENCODER_BASE, ENCODER_PIXEL = 16 << 20, 144
"""Bytes that x264 and the conversion to YUV take, and bytes more for each pixel of a frame: about a dozen
frames (one for each thread, references, B-frames) of about 12 bytes a pixel."""

MIN_FREE = 8 << 20
"""Bytes that must be free before a run: an 81-frame 480p video takes 1 to 5 MB."""

CONVERSION_THREADS = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
"""From version 17 on PyAV converts with a thread on every core unless told; a frame is 2 ms of one's work."""


class VideoWriter:
    """Takes the frames of one video in order and writes its mp4; a context manager, see above.

    Leaving the `with` block without `close` leaves nothing behind.
    """

    def __init__(
        self, path: str | Path, height: int, width: int, fps: int = 16, overwrite: bool = False
    ) -> None:
        """Prove `path` usable and make ready for frames of height x width.

        Raises OutputError when the path cannot be used, RequestError for odd sizes.
        """
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise RequestError(f"frames are {height}x{width}; expected even height and width.")
        self.path = check_output(path, overwrite)
        self.height, self.width, self.fps, self.overwrite = height, width, fps, overwrite
        self.count = 0  # frames added
        self._part = part_of(self.path)
        self._encoding: _Encoding | None = self._new_encoding()

    def add(self, frames: np.ndarray) -> None:
        """Append frames, uint8 (n, H, W, 3) in RGB; waits while the queue is full.

        They are read later: the caller does not change them any more. Raises OutputError when the encoding
        of earlier frames has failed, RequestError for frames of another kind or size.
        """
        self._take(frames, wait=True)

    def offer(self, frames: np.ndarray) -> int:
        """`add` those of `frames`, from the first on, that there is room for now; returns how many."""
        return self._take(frames, wait=False)

    def restart(self) -> None:
        """Forget all frames, for a decode that begins again."""
        self._open().stop()
        self.count = 0
        self._encoding = self._new_encoding()

    def close(self, metadata: dict[str, Any] | None = None, path: str | Path | None = None) -> Path:
        """Finish the video, with `metadata` in it, and give it its name; returns where it is.

        `path` is a name in the same directory to take instead of the first. Raises OutputError when
        encoding or writing failed, RequestError when there are no frames; then nothing is left behind.
        """
        path = self.path if path is None else check_output(path, self.overwrite)
        encoding = self._open()
        if not self.count:
            raise RequestError(f"no frames were given for {path}; expected one at least.")
        try:
            with output_errors(path):
                packets = encoding.finish()
            with whole_output(path, self.overwrite, self._part) as part:
                _write(encoding.container, packets, metadata or {})
                _check_complete(part, self.count)
        finally:
            self.abort()
        return path

    def abort(self) -> None:
        """Stop and leave nothing behind; does nothing after `close`."""
        encoding, self._encoding = self._encoding, None
        if encoding is not None:
            encoding.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _take(self, frames: np.ndarray, wait: bool) -> int:
        shape, before = frames.shape, self.count
        if frames.dtype != np.uint8 or shape[1:] != (self.height, self.width, 3):
            expected = f"uint8 (n, {self.height}, {self.width}, 3)"
            raise RequestError(f"frames are {frames.dtype} {shape}; expected {expected}.")
        encoding = self._open()
        with output_errors(self.path):
            for frame in frames:
                if not encoding.put(frame, wait):
                    break
                self.count += 1
        return self.count - before

    def _open(self) -> "_Encoding":
        if self._encoding is None:
            raise ValueError(f"the writer of {self.path} is closed")
        return self._encoding

    def _new_encoding(self) -> "_Encoding":
        with output_errors(self.path):
            return _Encoding(self._part, self.height, self.width, self.fps)


# ---------------------------------------------------------------------------------------------- encoding


class _Encoding:
    """Frames to packets on a thread of its own, which begins with the first frame.

    Whoever holds `changed` may look at the queue, the error and whether the end was told. The container
    opens its file when its first packet is written, so it belongs to nobody's disk until then.
    """

    def __init__(self, part: Path, height: int, width: int, fps: int) -> None:
        self.container = av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = _add_stream(self.container, height, width, fps)
        self._time_base = 1 / Fraction(fps)
        self._packets: list[av.Packet] = []
        self._changed = Condition()
        self._queue: deque[np.ndarray] = deque()
        self._error: BaseException | None = None
        self._ended = self._stopped = False
        self._thread: Thread | None = None

    def put(self, frame: np.ndarray, wait: bool) -> bool:
        """Queue one frame (H, W, 3), when there is room; raises what the thread failed with.

        Without `wait`, only if there is room at this moment: whether it was queued.
        """
        if self._thread is None:
            # A process that ends must not wait for a video that nobody will close.
            self._thread = Thread(target=self._work, name="video writer", daemon=True)
            self._thread.start()
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: len(self._queue) < QUEUED or self._error is not None)
            if self._error is not None:
                raise self._error
            if len(self._queue) >= QUEUED:
                return False
            self._queue.append(frame)
            self._changed.notify_all()
            return True

    def finish(self) -> list[av.Packet]:
        """Wait until every frame is encoded; the packets in the order of the file, or raise what failed."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._packets

    def stop(self) -> None:
        """Encode no more, drop everything."""
        with self._changed:
            self._ended = self._stopped = True
            self._queue.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._packets = []
        self.container.close()

    def _next(self) -> np.ndarray | None:
        """The next frame; None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ended)
            frame = self._queue.popleft() if self._queue else None
            self._changed.notify_all()
            return frame

    def _work(self) -> None:
        try:
            converter, number = VideoReformatter(), 0
            while (pixels := self._next()) is not None:
                frame = _to_yuv(converter, pixels)
                frame.pts, frame.time_base = number, self._time_base
                self._packets += self._stream.encode(frame)
                number += 1
            if not self._stopped:
                self._packets += self._stream.encode(None)
        except BaseException as error:  # noqa: BLE001 - raised where the caller asks next
            with self._changed:
                self._error = error
                self._queue.clear()
                self._changed.notify_all()


def _add_stream(container: Any, height: int, width: int, fps: int) -> Any:
    """H.264 High, yuv420p, limited range, BT.709, a key frame every two seconds so that players can jump."""
    options = {"crf": str(CRF), "preset": PRESET, "profile": "high", "x264-params": X264}
    stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    # Whole frames in parallel: slices of one frame, PyAV's default, wait for each other and cost bytes.
    context.thread_count, context.thread_type = THREADS, "FRAME"
    context.gop_size = 2 * fps
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE
    return stream


def _to_yuv(converter: VideoReformatter, pixels: np.ndarray) -> av.VideoFrame:
    """RGB (H, W, 3) as yuv420p by BT.709; one converter for all frames keeps its tables."""
    return converter.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        **CONVERSION_THREADS,
    )


def _write(container: Any, packets: list[av.Packet], metadata: dict[str, Any]) -> None:
    """Write the whole mp4: the prompt as its title, the record as JSON in its comment, the packets."""
    container.metadata["title"] = _title(metadata)
    # Half a surrogate pair has no UTF-8; written with a backslash it is the same text to JSON.
    comment = json.dumps(metadata, ensure_ascii=False, default=str)
    container.metadata["comment"] = comment.encode("utf-8", "backslashreplace").decode()
    with container:  # its end writes the index, and fails where the disk is full
        for packet in packets:
            container.mux(packet)


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
        probe = part_of(path)
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


def part_of(path: Path) -> Path:
    """Where `path` grows: hidden, beside it (a rename must not cross disks), with its format's suffix."""
    own = f"{os.getpid()}-{secrets.token_hex(3)}"  # two writers of one process may want the same name
    return path.with_name(f".{path.stem[:40]}.part-{own}{path.suffix.lower()}")


@contextmanager
def whole_output(path: Path, overwrite: bool, part: Path | None = None) -> Iterator[Path]:
    """Yield the hidden name to write; then sync and rename it, or remove it whatever went wrong."""
    part = part or part_of(path)
    try:
        with output_errors(path):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            _refuse_existing(path, overwrite)  # another process may have been faster
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """What the system or FFmpeg refuses inside becomes an OutputError that names `path`."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise OutputError(_os_sentence(path, error)) from error


def _os_sentence(path: Path, error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {path} is full; free some space, or name another disk with --output."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = os.strerror(number).lower()
        return f"The output {path} cannot be written ({reason}); expected a writable directory: name another."
    reason = getattr(error, "strerror", None) or str(error)
    return f"The output {path} could not be written ({reason}); nothing was left there."
