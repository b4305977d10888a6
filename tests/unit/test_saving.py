"""A video that is encoded while it is decoded: the same file, and none at all when anything fails."""

import errno
import gc
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.frames
from entrypoint.account import Account
from entrypoint.events import Reporter
from entrypoint.output import Target
from entrypoint.progress import LineReporter
from entrypoint.saving import Saving
from runtime import video, video_writer
from runtime.errors import OutputError
from runtime.stages import Stage
from runtime.video import Video, read_frames, read_metadata
from runtime.video_writer import QUEUED, VideoWriter
from tests.conftest import Run
from tests.unit.test_video_writer import RECORD, left_in, moving

SOON = 20.0  # seconds, after which a thread hangs
FOX = ("--seed", 5, "--output", "fox.mp4", "--frames", 29)


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "video writer"] == []


class Told(Reporter):
    """Keeps the stages that it is told of."""

    def __init__(self) -> None:
        super().__init__({})
        self.stages: list[Stage] = []

    def stage(self, stage: Stage) -> None:
        self.stages.append(stage)


@pytest.fixture
def saving(tmp_path: Path) -> Iterator[Saving]:
    target = Target(tmp_path / "v.mp4", overwrite=False, explicit=False)
    with Saving(target, 16, Account(Told())) as saving:
        yield saving


def decoded(frames: np.ndarray, *counts: int) -> Iterator[Stage]:
    """The stages of a decode after which so many frames are whole."""
    for number, count in enumerate(counts, start=1):
        yield Stage("decode", number, len(counts), 0.1, frames=frames, whole=count)


# ------------------------------------------------------------------------------------------- the same file


@pytest.mark.parametrize("counts", [(1, 5, 9, 13, 17, 21, 25, 29), (0, 0, 3, 29), (0, 29), (29,)])
def test_the_file_is_that_of_the_whole_video(saving: Saving, tmp_path: Path, counts: tuple[int, ...]) -> None:
    frames = moving(29, seed=len(counts))
    once = Video(frames, 16, RECORD).save(tmp_path / "once.mp4")
    saving.take(Stage("denoise", 4, 4, 1.0))
    for stage in decoded(frames, *counts):
        saving.take(stage)
        assert left_in(tmp_path) == ["once.mp4"]
    path, _ = saving.save(Video(frames, 16, RECORD), contact_sheet=False)
    assert path.read_bytes() == once.read_bytes() and read_metadata(path) == RECORD
    assert left_in(tmp_path) == ["once.mp4", "v.mp4"]


def test_a_decode_that_begins_again_counts_alone(saving: Saving, tmp_path: Path) -> None:
    wrong, right = moving(21, seed=1), moving(21, seed=2)
    once = Video(right, 16, RECORD).save(tmp_path / "once.mp4")
    for stage in decoded(wrong, 9, 17):
        saving.take(stage)
    gone = weakref.ref(wrong)
    del wrong, stage
    for stage in decoded(right, 0, 13):  # nothing of it is whole, and what came before is forgotten
        saving.take(stage)
        gc.collect()
        assert gone() is None
    path, _ = saving.save(Video(right, 16, RECORD), contact_sheet=False)
    assert path.read_bytes() == once.read_bytes()


def test_a_name_that_was_taken_meanwhile_gets_a_number(saving: Saving, tmp_path: Path) -> None:
    frames = moving(9)
    for stage in decoded(frames, 5, 9):
        saving.take(stage)
    (tmp_path / "v.mp4").write_bytes(b"another run")
    path, sheet = saving.save(Video(frames, 16, RECORD), contact_sheet=True)
    assert (path.name, sheet and sheet.name) == ("v-2.mp4", "v-2.png")
    assert (tmp_path / "v.mp4").read_bytes() == b"another run"


def slowed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The encoder waits for this event before every frame."""
    go_on, convert = threading.Event(), video_writer._to_yuv

    def slow(*given: Any) -> Any:
        assert go_on.wait(SOON)
        return convert(*given)

    monkeypatch.setattr(video_writer, "_to_yuv", slow)
    return go_on


def test_a_slow_encoder_keeps_no_decode_waiting(
    saving: Saving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frames, told = moving(4 * QUEUED + 1), saving.account.reporter
    once = Video(frames, 16, RECORD).save(tmp_path / "once.mp4")
    go_on = slowed(monkeypatch)
    for stage in decoded(frames, 1, *range(5, len(frames) + 1, 4)):
        saving.take(stage)  # returns, although nothing is encoded yet
    with VideoWriter(tmp_path / "other.mp4", 64, 96) as writer:
        assert QUEUED <= writer.offer(frames) <= QUEUED + 1  # one of them may be at the encoder
        go_on.set()
    path, _ = saving.save(Video(frames, 16, RECORD), contact_sheet=False)
    assert path.read_bytes() == once.read_bytes()
    assert isinstance(told, Told)
    steps = [(stage.phase, stage.step, stage.steps) for stage in told.stages]
    assert len(steps) > 2 and steps == sorted(set(steps)) and steps[-1] == ("save", 65, 65)
    assert told.stages[0].eta is not None and QUEUED <= told.stages[0].began < 65
    lines = LineReporter({})
    for stage in told.stages:
        lines.stage(stage)
    assert capsys.readouterr().err.splitlines() == [f"write video 65/65, {told.stages[-1].seconds:.1f} s"]


# --------------------------------------------------------------------------------------------- the program


@pytest.fixture
def left_over(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each video's encoder lacked when its decode was over."""
    lacked, honest = [], video._encode

    def encode(whole: Video, writer: VideoWriter, *rest: Any) -> None:
        lacked.append(len(whole.frames) - writer.count)
        honest(whole, writer, *rest)

    monkeypatch.setattr(video, "_encode", encode)
    return lacked


def test_every_verb_encodes_while_it_decodes(small: Run, t2v: Run, left_over: list[int]) -> None:
    done = small(*FOX, "--save-latents", "--json")
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    saved = [event for event in events if event.get("phase") == "save"]
    assert saved[-1]["step"] == saved[-1]["steps"] == 29
    assert t2v("rerun", "fox.mp4", "--device", "cpu").exit_code == 0
    assert t2v("decode", "fox.latents.safetensors", "--device", "cpu", "--output", "d.mp4").exit_code == 0
    assert left_over == [0, 0, 0]
    frames = read_frames("fox.mp4")
    for other in ("fox-rerun.mp4", "d.mp4"):
        assert (read_frames(other) == frames).all()
    record = read_metadata("fox.mp4")
    assert set(record["timings"]) == {"text", "denoise", "decode"} and record["seed"] == 5


def test_a_resumed_decode_does_too(small: Run, t2v: Run, left_over: list[int]) -> None:
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(runtime.frames, "decode_pieces", raiser(KeyboardInterrupt()))
        assert small(*FOX).exit_code == 130
    assert t2v("resume", "fox.run.safetensors").exit_code == 0
    assert left_over == [0] and len(read_frames("fox.mp4")) == 29


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


def change_piece(monkeypatch: pytest.MonkeyPatch, number: int, then: Callable[[Any], None]) -> None:
    """Have `then` see the frames of piece `number`, from 0 on, or of all for -1."""
    honest = runtime.frames.decode_pieces

    def pieces(*given: Any) -> Iterator[Any]:
        for at, piece in enumerate(honest(*given)):
            if number in (at, -1):
                then(piece.frames)
            yield piece

    monkeypatch.setattr(runtime.frames, "decode_pieces", pieces)


@pytest.mark.parametrize(
    ("number", "then", "code", "said"),
    [
        (-1, lambda frames: frames.fill_(0.25), 6, "one flat colour"),
        (5, lambda frames: frames.fill_(float("nan")), 6, "from frame 17 on are not finite"),
        (5, raiser(KeyboardInterrupt()), 130, "interrupted; nothing half-written is left"),
        (5, raiser(RuntimeError("a bug")), 1, "a bug"),
    ],
    ids=["flat", "not finite", "interrupted", "failed"],
)
def test_what_fails_while_frames_are_encoded_leaves_the_latents(
    small: Run,
    t2v: Run,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    then: Callable[[Any], None],
    code: int,
    said: str,
) -> None:
    offered, honest = [], VideoWriter.offer

    def offer(writer: VideoWriter, frames: np.ndarray) -> int:
        offered.append(honest(writer, frames))
        assert left_in(workplace) == ["fox.run.safetensors"]
        return offered[-1]

    monkeypatch.setattr(VideoWriter, "offer", offer)
    with monkeypatch.context() as broken:
        change_piece(broken, number, then)
        result = small(*FOX)
    assert result.exit_code == code and said in result.stderr, result.output
    assert sum(offered) == (29 if number == -1 else 17)  # so there was something to undo
    assert left_in(workplace) == ["fox.run.safetensors"]
    assert "the latents are kept" in result.stderr
    assert t2v("resume", "fox.run.safetensors").exit_code == 0 and left_in(workplace) == ["fox.mp4"]


@pytest.mark.parametrize("at", [0, 2, 28])
def test_an_encoder_that_fails_says_what_it_always_said(
    small: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    calls, convert = iter(range(1000)), video_writer._to_yuv

    def full(*given: Any) -> Any:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return convert(*given)

    with monkeypatch.context() as broken:
        broken.setattr(video_writer, "_to_yuv", full)
        result = small(*FOX)
    with pytest.raises(OutputError) as direct, monkeypatch.context() as broken:
        broken.setattr(video_writer, "_to_yuv", raiser(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        Video(moving(3)).save("fox.mp4")
    assert result.exit_code == direct.value.exit_code == 2
    assert f"t2v: error: {direct.value}" in result.stderr.splitlines()
    assert "the latents are kept" in result.stderr and left_in(workplace) == ["fox.run.safetensors"]
