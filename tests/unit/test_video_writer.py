"""The writer that encodes while frames come: same bytes, bounded memory, and no trace of what fails."""

import errno
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from runtime import video_writer
from runtime.errors import OutputError, RequestError
from runtime.video import Video, read_frames, read_metadata
from runtime.video_writer import QUEUED, VideoWriter

ROOT = Path(__file__).resolve().parents[2]
RECORD = {"prompt": "a red fox", "timings": {"decode": 1.31}}
SOON = 20.0  # seconds, after which a thread hangs


def moving(count: int, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Frames (F, H, W, 3), uint8: random noise that drifts under random stripes."""
    random = np.random.default_rng(seed)
    still = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    stripes = random.integers(0, 40, (count, 1, width, 3), dtype=np.uint8)
    return np.stack([np.roll(still, (i, 2 * i), (0, 1)) // 2 + stripes[i] for i in range(count)])


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "video writer"] == []


# ------------------------------------------------------------------------------------------- the same file


@pytest.mark.parametrize("sizes", [[1, 4, 4, 4, 4, 4, 4, 4], [29], [1] * 29, [0, 20, 0, 9]])
def test_pieces_give_the_file_of_the_whole(tmp_path: Path, sizes: list[int]) -> None:
    frames = moving(29, seed=len(sizes))
    whole = Video(frames, 16, RECORD).save(tmp_path / "whole.mp4")
    with VideoWriter(tmp_path / "pieces.mp4", 64, 96, 16) as writer:
        for count in sizes:
            writer.add(frames[writer.count : writer.count + count])
        assert writer.count == 29
        pieces = writer.close(RECORD)
    assert pieces.read_bytes() == whole.read_bytes()
    assert read_metadata(pieces) == RECORD
    assert left_in(tmp_path) == ["pieces.mp4", "whole.mp4"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin threads to cores")
def test_one_core_gives_the_file_of_all(tmp_path: Path) -> None:
    frames = np.random.default_rng(4).integers(0, 256, (21, 128, 192, 3), dtype=np.uint8)
    cores = os.sched_getaffinity(0)
    everywhere = Video(frames, 16).save(tmp_path / "all.mp4").read_bytes()
    try:
        os.sched_setaffinity(0, {min(cores)})  # of this thread, and those that it starts
        alone = Video(frames, 16).save(tmp_path / "one.mp4").read_bytes()
    finally:
        os.sched_setaffinity(0, cores)
    assert alone == everywhere


@pytest.mark.parametrize("begun", [0, 5, 29])
def test_save_adds_what_its_writer_lacks(tmp_path: Path, begun: int) -> None:
    """A decode by tiles has added nothing, one of whole pictures everything."""
    frames = moving(29, seed=begun)
    whole = Video(frames, 16, RECORD).save(tmp_path / "whole.mp4")
    writer = VideoWriter(tmp_path / "fox.mp4", 64, 96, 16)
    writer.add(frames[:begun])
    path = Video(frames, 16, RECORD).save(tmp_path / "fox-2.mp4", writer=writer)  # its own name was taken
    assert path == tmp_path / "fox-2.mp4"
    assert path.read_bytes() == whole.read_bytes()
    assert left_in(tmp_path) == ["fox-2.mp4", "whole.mp4"]


def test_a_video_of_another_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16 fps for a video at 8"):
        Video(moving(2), 8).save(tmp_path / "v.mp4", writer=VideoWriter(tmp_path / "v.mp4", 64, 96, 16))
    assert left_in(tmp_path) == []


def test_restart_forgets_all_frames(tmp_path: Path) -> None:
    wrong, right = moving(40, seed=1), moving(11, seed=2)
    with VideoWriter(tmp_path / "again.mp4", 64, 96) as writer:
        writer.add(wrong)
        writer.restart()
        assert writer.count == 0
        writer.add(right)
        path = writer.close(RECORD)
    assert path.read_bytes() == Video(right, 16, RECORD).save(tmp_path / "once.mp4").read_bytes()


# ------------------------------------------------------------------------------------------------- overlap


def test_frames_are_encoded_while_others_come(tmp_path: Path) -> None:
    """All but those that the queue, the encoder and this loop hold are gone when the last was added."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    with VideoWriter(tmp_path / "v.mp4", 64, 96) as writer:
        for frame in moving(80):
            frames = frame[None].copy()
            alive.append(weakref.ref(frames))
            writer.add(frames)
            del frames
            most = max(most, sum(ref() is not None for ref in alive))
            assert left_in(tmp_path) == []
        writer.close()
    print(f"at most {most} frames at once")
    assert most <= QUEUED + 2
    assert len(read_frames(tmp_path / "v.mp4")) == 80


def test_a_slow_encoder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, convert = threading.Event(), video_writer._to_yuv

    def slow(*given: Any) -> Any:
        assert go_on.wait(SOON)
        return convert(*given)

    monkeypatch.setattr(video_writer, "_to_yuv", slow)
    frames = moving(QUEUED + 9)
    with VideoWriter(tmp_path / "v.mp4", 64, 96) as writer:
        feeding = threading.Thread(target=writer.add, args=(frames,))
        feeding.start()
        feeding.join(0.3)
        assert feeding.is_alive() and writer.count == QUEUED + 1  # one of them at the encoder
        go_on.set()
        feeding.join(SOON)
        assert writer.count == len(frames)
        writer.close()
    assert len(read_frames(tmp_path / "v.mp4")) == len(frames)


# -------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("fault", "raised", "told"),
    [
        (av.FFmpegError(errno.ENOMEM, "Cannot allocate memory"), OutputError, r"v\.mp4 could not .*allocate"),
        (OSError(errno.EIO, "Input/output error"), OutputError, r"v\.mp4 could not .*Input/output error"),
        (MemoryError("large"), MemoryError, "large"),
    ],
)
@pytest.mark.parametrize("count", [3, 3 * QUEUED])
def test_faults_of_the_thread_reach_the_caller(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    fault: Exception,
    raised: type[Exception],
    told: str,
) -> None:
    """At `close` for a short video; for one that the queue does not hold `add` does not wait for ever."""

    def fail(*given: Any) -> None:
        raise fault

    monkeypatch.setattr(video_writer, "_to_yuv", fail)
    with VideoWriter(tmp_path / "v.mp4", 64, 96) as writer, pytest.raises(raised, match=told):
        writer.add(moving(count))
        assert count <= QUEUED
        writer.close(RECORD)
    assert left_in(tmp_path) == []


def test_leaving_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "v.mp4", 64, 96) as writer:
        writer.add(moving(40))
        raise KeyboardInterrupt
    assert left_in(tmp_path) == []
    writer.abort()  # again, which is nothing
    for use in (lambda: writer.add(moving(1)), writer.close, writer.restart):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_name_that_was_taken_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    writer = VideoWriter(path, 64, 96)
    writer.add(moving(3))
    path.write_bytes(b"another run")
    with pytest.raises(OutputError, match="exists"):
        writer.close()
    assert left_in(tmp_path) == ["v.mp4"] and path.read_bytes() == b"another run"


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.mp4").touch()
    with pytest.raises(OutputError, match="--overwrite"):
        VideoWriter(tmp_path / "old.mp4", 64, 96)
    with pytest.raises(RequestError, match="63x96; expected even"):
        VideoWriter(tmp_path / "v.mp4", 63, 96)
    with VideoWriter(tmp_path / "v.mp4", 64, 96) as writer:
        for wrong in (moving(2, 96, 64), moving(1)[0], moving(1).astype(np.float32)):
            with pytest.raises(RequestError, match=r"expected uint8 \(n, 64, 96, 3\)"):
                writer.add(wrong)
        with pytest.raises(RequestError, match="no frames"):
            writer.close()
    assert left_in(tmp_path) == ["old.mp4"]


# ------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
import numpy as np
from runtime.memory.meter import host_peak
from runtime.video_writer import VideoWriter
path, height, width, count = sys.argv[1], *map(int, sys.argv[2:])
still = np.random.default_rng(5).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
still = still.repeat(8, 0).repeat(8, 1)
before = host_peak()
with VideoWriter(path, height, width) as writer:
    for i in range(count):
        writer.add(np.roll(still, (i, 3 * i), (0, 1))[None])
    size = writer.close().stat().st_size
print(host_peak() - before - size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(("height", "width", "count"), [(480, 832, 30), (480, 832, 90), (720, 1280, 30)])
def test_memory_is_what_the_formula_says(tmp_path: Path, height: int, width: int, count: int) -> None:
    arguments = [str(tmp_path / "v.mp4"), str(height), str(width), str(count)]
    command = [sys.executable, "-c", MEASURE, *arguments]
    found = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    stated = video_writer.ENCODER_BASE + (video_writer.ENCODER_PIXEL + 3 * QUEUED) * height * width
    print(f"{height}x{width}x{count}: {found / 1e6:.0f} MB, stated {stated / 1e6:.0f} MB")
    assert 0.5 * stated < found <= stated < 300e6
