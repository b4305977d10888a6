"""The files of a run: an mp4 that is encoded while its frames are decoded, and what lies beside it.

The name is given last, when all frames have passed their checks: until then nothing is on the disk
(`runtime/video_writer.py`).
"""

import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from entrypoint.account import Account
from entrypoint.events import Reporter
from entrypoint.output import Target
from runtime.errors import OutputError

if TYPE_CHECKING:
    import numpy as np

    from runtime.stages import Stage
    from runtime.video import Video
    from runtime.video_writer import VideoWriter


class Saving:
    """Takes the frames of a decode as they come, and saves the video of them. A context manager.

    Leaving it without `save` leaves nothing behind.
    """

    def __init__(self, target: Target, fps: int, account: Account) -> None:
        self.target, self.fps, self.account = target, fps, account
        self._writer: VideoWriter | None = None
        # Which frames it has begun with. Weak: those of a decode that ran out of memory must go.
        self._begun: weakref.ref[np.ndarray] | None = None

    def take(self, stage: "Stage") -> None:
        """Encode what is whole of a decode's frames, as far as the encoder keeps up; other stages pass.

        Raises OutputError when the encoder failed, or when the place of the video cannot be used any more.
        """
        if stage.frames is None:
            return
        writer = self._writer_of(stage.frames)
        # What there is no room for comes with the next piece, or at the end: the GPU never waits.
        writer.offer(stage.frames[writer.count : stage.whole])

    def save(self, video: "Video", *, contact_sheet: bool) -> tuple[Path, Path | None]:
        """Write the mp4 and, if asked for, the contact sheet; returns both paths. Tells of it as a phase."""
        from runtime.stages import Stage

        begun, count = time.perf_counter(), len(video.frames)
        target = self.target.now()
        sheet_path = target.contact_sheet  # before the video has its name, so that both get the same number
        writer = self._writer_of(video.frames)
        before = writer.count

        def tell(done: int) -> None:
            if done < count:
                self.account.stage(Stage("save", done, count, time.perf_counter() - begun, began=before))

        path = video.save(target.path, target.overwrite, writer, tell)
        sheet = _save_sheet(video, sheet_path, self.account.reporter) if contact_sheet else None
        seconds, nbytes = time.perf_counter() - begun, path.stat().st_size
        self.account.stage(Stage("save", count, count, seconds, nbytes))
        return path, sheet

    def _writer_of(self, frames: "np.ndarray") -> "VideoWriter":
        """The writer, which has none but `frames` (F, H, W, 3): another array is another decode."""
        if self._writer is None:
            from runtime.video_writer import VideoWriter

            target = self.target.now()
            _, height, width, _ = frames.shape
            self._writer = VideoWriter(target.path, height, width, self.fps, target.overwrite)
        elif self._begun is None or self._begun() is not frames:
            self._writer.restart()
        self._begun = weakref.ref(frames)
        return self._writer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.abort()


def _save_sheet(video: "Video", path: Path, reporter: Reporter) -> Path | None:
    from runtime.video import contact_sheet

    try:
        return contact_sheet(video.frames, path)
    except OutputError as error:  # the video is there, which is what was asked for first
        reporter.warn(f"there is no contact sheet: {error}")
        return None
