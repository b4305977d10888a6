"""Videos: what is written comes back, plays, says how it was made; what fails leaves nothing behind."""

import ctypes
import errno
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import video, video_writer
from runtime.errors import OutputError, RequestError
from runtime.video import (
    SHEET_GREY,
    Video,
    check_output,
    contact_sheet,
    frames_to_uint8,
    read_frames,
    read_metadata,
)

METADATA = {
    "prompt": "a red circle\nmöves left ❤",
    "seed": 2**63 - 1,
    "steps": [1.0, 0.625],
    "plan": {"a": None},
}


def smooth(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random frames (F, H, W, 3), uint8, without detail finer than the chroma that H.264 keeps."""
    random = np.random.default_rng(seed)
    t, y, x = np.meshgrid(
        np.arange(frames) / 20, np.arange(height) / 100, np.arange(width) / 100, indexing="ij"
    )
    waves = np.zeros((frames, height, width, 3))
    for channel in range(3):
        for _ in range(4):
            a, b, c, phase = random.normal(size=4) * (3, 5, 5, 3)
            waves[..., channel] += np.cos(a * t + b * y + c * x + phase)
    return (127.5 + 127.5 * np.clip(waves / 3, -1, 1)).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(("shape", "fps"), [((17, 96, 160), 8), ((5, 64, 48), 16), ((1, 32, 32), 30)])
def test_round_trip(tmp_path: Path, shape: tuple[int, int, int], fps: int) -> None:
    frames = smooth(*shape, seed=fps)
    path = Video(frames, fps, METADATA).save(tmp_path / "video.mp4")
    decoded = read_frames(path)
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8
    quality = psnr(frames, decoded)
    print(f"{shape} at {fps} fps: {quality:.1f} dB")
    assert quality > 35
    assert read_metadata(path) == METADATA
    assert left_in(tmp_path) == ["video.mp4"]


def test_the_stream_says_what_players_need(tmp_path: Path) -> None:
    path = Video(smooth(9, 96, 160), 12, METADATA).save(tmp_path / "video.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.profile, context.pix_fmt) == ("h264", "High", "yuv420p")
        assert (context.width, context.height) == (160, 96)
        assert (stream.frames, stream.average_rate) == (9, 12)
        assert stream.duration is not None and stream.time_base is not None
        assert stream.duration * stream.time_base == Fraction(9, 12)
        tags = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
        assert tags == (1, 1, 1, 1)  # limited range, BT.709 three times
        assert container.metadata["title"] == "a red circle möves left ❤"
        assert "creation_time" not in container.metadata
        times = sorted(float(frame.time) for frame in container.decode(video=0) if frame.time is not None)
    assert times == pytest.approx([i / 12 for i in range(9)])
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays while it downloads


@pytest.mark.parametrize(
    ("rgb", "yuv"),
    [
        ((255, 0, 0), (63, 102, 240)),
        ((0, 255, 0), (173, 42, 26)),
        ((0, 0, 255), (32, 240, 118)),
        ((255, 255, 255), (235, 128, 128)),
        ((0, 0, 0), (16, 128, 128)),
    ],
)
def test_colours_are_bt709_limited(
    tmp_path: Path, rgb: tuple[int, int, int], yuv: tuple[int, int, int]
) -> None:
    """The numbers of the standard: BT.601 would give 81, 90, 240 for red."""
    frames = np.broadcast_to(np.array(rgb, np.uint8), (2, 32, 32, 3))
    path = Video(frames, 16).save(tmp_path / "flat.mp4")
    with av.open(str(path)) as container:
        planes = next(container.decode(video=0)).to_ndarray(format="yuv420p")
    found = planes[16, 16], planes[36, 8], planes[44, 8]
    assert np.abs(np.array(found, int) - yuv).max() <= 1
    assert np.abs(read_frames(path).astype(int) - rgb).max() <= 3


def test_same_frames_same_file(tmp_path: Path) -> None:
    noisy = np.random.default_rng(1).integers(0, 256, (9, 96, 160, 3), dtype=np.uint8)
    first = Video(noisy, 8, METADATA).save(tmp_path / "a.mp4").read_bytes()
    for _ in range(4):
        assert Video(noisy, 8, METADATA).save(tmp_path / "b.mp4", overwrite=True).read_bytes() == first


def test_no_prompt_and_odd_values(tmp_path: Path) -> None:
    metadata = {"model": Path("/weights/x"), "control": "a\x00b\x1b[0m"}
    path = Video(smooth(1, 32, 32), 16, metadata).save(tmp_path / "v.mp4")
    assert read_metadata(path) == {"model": "/weights/x", "control": "a\x00b\x1b[0m"}


@settings(max_examples=15, deadline=None)
@given(prompt=st.text(max_size=300))
def test_any_prompt_survives(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    path = tmp_path_factory.mktemp("prompt") / "v.mp4"
    Video(np.full((1, 32, 32, 3), 90, np.uint8), 16, {"prompt": prompt}).save(path)
    assert read_metadata(path) == {"prompt": prompt}


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "float32"),
        (np.ones((32, 32, 3), np.uint8), r"\(32, 32, 3\)"),
        (np.ones((0, 32, 32, 3), np.uint8), r"\(0, 32"),
        (np.ones((2, 33, 32, 3), np.uint8), "33x32.*even"),
        (np.ones((2, 3, 32, 32), np.uint8), r"expected uint8 \(F, H, W, 3\)"),
    ],
)
def test_frames_that_are_no_video(frames: np.ndarray, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        Video(frames)


# ----------------------------------------------------------------------------------------- float to uint8


def test_rounding_is_to_the_nearest_level() -> None:
    levels = np.arange(256)
    exact = (levels / 127.5 - 1).astype(np.float32)
    for offset, expected in ((0.0, levels), (0.4, levels), (-0.4, levels)):
        values = exact + np.float32(offset / 127.5)
        frames = np.broadcast_to(values, (3, 1, 1, 256))
        assert (frames_to_uint8(frames) == expected[None, None, :, None]).all()
    assert frames_to_uint8(np.full((3, 1, 1, 1), -7.0)).max() == 0
    assert frames_to_uint8(np.full((3, 1, 1, 1), 1.0001)).min() == 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layout_and_dtypes(dtype: torch.dtype) -> None:
    frames = torch.rand(3, 4, 6, 8, generator=torch.Generator().manual_seed(3)) * 2.4 - 1.2
    array = frames_to_uint8(frames.to(dtype))
    assert array.shape == (4, 6, 8, 3)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    assert (array == frames_to_uint8(frames.to(dtype).float().numpy())).all()
    c, f, y, x = 2, 3, 1, 7
    expected = ((frames[c, f, y, x].to(dtype).float().clamp(-1, 1) + 1) * 127.5).round()
    assert array[f, y, x, c] == expected


# ------------------------------------------------------------------------------------------- output paths


def test_check_output_creates_directories(tmp_path: Path) -> None:
    path = check_output(tmp_path / "a" / "b" / "v.MP4")
    assert path == tmp_path / "a" / "b" / "v.MP4"
    assert left_in(path.parent) == []


def test_existing_output(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"v\.mp4 exists; .*--overwrite"):
        check_output(path)
    with pytest.raises(OutputError, match="--overwrite"):
        Video(smooth(1, 32, 32)).save(path)
    assert path.read_bytes() == b"precious"
    Video(smooth(2, 32, 32)).save(path, overwrite=True)
    assert read_frames(path).shape[0] == 2


def test_unusable_outputs(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a directory; expected a file"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match=r"ends in '\.avi'; expected \.mp4"):
        check_output(tmp_path / "v.avi")
    with pytest.raises(OutputError, match=r"ends in ''"):
        check_output(tmp_path / "video")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="could not be written"):
        check_output(tmp_path / "file" / "v.mp4")
    with pytest.raises(OutputError, match="File name too long"):
        check_output(tmp_path / ("x" * 300 + ".mp4"))
    with pytest.raises(OutputError, match="home directory"):
        check_output("~nobody-of-this-name/v.mp4")


def test_unwritable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write anywhere: have the system say no

        def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "touch", refuse)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"cannot be written \(permission denied\)"):
        check_output(tmp_path / "v.mp4")


def test_little_free_space(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"MiB free; expected at least .* --output"):
        check_output(tmp_path / "v.mp4", need=1 << 60)


# ------------------------------------------------------------------------------------ nothing left behind


@pytest.mark.parametrize(
    ("fault", "raised", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "is full; free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), OutputError, "is full"),
        (OSError(errno.EIO, "Input/output error"), OutputError, "Input/output error"),
        (av.FFmpegError(errno.ENOSPC, "No space left on device"), OutputError, "is full"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (MemoryError("large"), MemoryError, "large"),
    ],
)
@pytest.mark.parametrize("where", ["_to_yuv", "_write", "_check_complete"])
def test_failed_writing_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    fault: BaseException,
    raised: type[BaseException],
    told: str,
) -> None:
    def fail(*given: Any) -> None:
        for part in tmp_path.glob(".v.part-*") if where != "_to_yuv" else ():  # before there is a file
            part.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(video_writer, where, fail)
    path = tmp_path / "v.mp4"
    path.write_bytes(b"the old one")
    with pytest.raises(raised, match=told):
        Video(smooth(2, 32, 32)).save(path, overwrite=True)
    assert left_in(tmp_path) == ["v.mp4"]
    assert path.read_bytes() == b"the old one"


def test_interrupt_between_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = smooth(40, 64, 64)

    class Interrupted:
        shape = frames.shape
        dtype = frames.dtype

        def __getitem__(self, wanted: slice) -> Any:
            return self

        def __iter__(self) -> Any:
            yield from frames[:30]
            assert left_in(tmp_path) == []  # so that even a kill leaves nothing
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Video(Interrupted()).save(tmp_path / "v.mp4")  # type: ignore[arg-type]
    assert left_in(tmp_path) == []


def test_file_that_appears_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = video_writer._write
    path = tmp_path / "v.mp4"

    def slow(*given: Any) -> None:
        write(*given)
        path.write_bytes(b"another process")

    monkeypatch.setattr(video_writer, "_write", slow)
    with pytest.raises(OutputError, match="exists"):
        Video(smooth(1, 32, 32)).save(path)
    assert left_in(tmp_path) == ["v.mp4"]
    assert path.read_bytes() == b"another process"


def test_short_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = video_writer._write
    monkeypatch.setattr(
        video_writer, "_write", lambda container, packets, record: write(container, packets[:-1], record)
    )
    with pytest.raises(OutputError, match="full"):
        Video(smooth(4, 32, 32)).save(tmp_path / "v.mp4")
    assert left_in(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 64 KiB; only root may mount one."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or libc.mount(b"none", bytes(tmp_path), b"tmpfs", 0, b"size=64k") != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield tmp_path
    libc.umount2(bytes(tmp_path), 2)


def test_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (17, 96, 160, 3), dtype=np.uint8)
    with pytest.raises(OutputError, match=r"0\.1 MiB free; expected at least 8\.0 MiB"):
        check_output(small_disk / "v.mp4")
    for module in (video, video_writer):
        monkeypatch.setattr(module, "check_output", lambda path, overwrite: Path(path))
    with pytest.raises(OutputError, match="is full") as caught:
        Video(noise).save(small_disk / "v.mp4")
    assert caught.value.exit_code == 2
    assert left_in(small_disk) == []
    with pytest.raises(OutputError, match="is full"):
        contact_sheet(noise, small_disk / "sheet.png")
    assert left_in(small_disk) == []


# ------------------------------------------------------------------------------------------------ reading


def test_unreadable_videos(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent\.mp4 cannot be read"):
        read_metadata(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(RequestError, match="cannot be read as a video"):
        read_frames(tmp_path / "text.mp4")


def test_videos_of_other_programs(tmp_path: Path) -> None:
    for comment, told in (("", "does not say"), ("made by hand", "does not say"), ("[1]", r"'\[1\]'")):
        path = tmp_path / "other.mp4"
        with av.open(str(path), "w") as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(smooth(1, 32, 32)[0], format="rgb24")
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        with pytest.raises(RequestError, match=told):
            read_metadata(path)


# ------------------------------------------------------------------------------------------ contact sheet


def test_contact_sheet_enlarges(tmp_path: Path) -> None:
    frames = smooth(17, 96, 160)
    path = contact_sheet(frames, tmp_path / "new" / "sheet.png", columns=4)
    assert path.read_bytes().startswith(b"\x89PNG")
    with av.open(str(path)) as container:
        sheet = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert sheet.shape == (4 * 192 + 3 * 4, 4 * 320 + 3 * 4, 3)  # twice the size, gaps of 4
    assert (sheet[:192:2, :320:2] == frames[0]).all()  # lossless, nearest
    assert (sheet[1:192:2, 1:320:2] == frames[0]).all()
    assert (sheet[-192::2, -320::2] == frames[-1]).all()
    assert (sheet[192:196] == SHEET_GREY).all()
    assert left_in(path.parent) == ["sheet.png"]


@pytest.mark.parametrize(("count", "columns", "grid"), [(3, None, (2, 2)), (1, None, (1, 1)), (5, 9, (1, 5))])
def test_contact_sheet_grid(tmp_path: Path, count: int, columns: int | None, grid: tuple[int, int]) -> None:
    path = contact_sheet(smooth(count, 160, 320), tmp_path / "sheet.png", columns)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == (grid[0] * 164 - 4, grid[1] * 324 - 4)


def test_contact_sheet_reduces(tmp_path: Path) -> None:
    frames = smooth(1, 480, 832)
    path = contact_sheet(frames, tmp_path / "sheet.png")
    with av.open(str(path)) as container:
        sheet = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert sheet.shape == (240, 416, 3)
    mean = frames[0, 100:102, 300:302].mean(axis=(0, 1))
    assert np.abs(sheet[50, 150] - mean).max() <= 0.5


def test_contact_sheet_refuses(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"expected \.png"):
        contact_sheet(smooth(1, 32, 32), tmp_path / "sheet.jpg")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="could not be written"):
        contact_sheet(smooth(1, 32, 32), tmp_path / "file" / "sheet.png")
