"""What a start does behind what it waits for: blocks that stay come while other things are done."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import loading
from runtime.errors import WeightsError
from runtime.memory.stored import PieceReader
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.stages import Stage
from tests import tiny
from tests.conftest import Run

REQUEST = Request(prompt=tiny.PROMPTS[0], **tiny.SMALL)  # type: ignore[arg-type]
SOON = 20.0  # seconds, after which a thread hangs


@pytest.fixture(autouse=True)
def no_reader_survives() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("weights-")] == []


def of_the_transformer(reader: PieceReader) -> bool:
    """Whether a reader's blocks are those: the text encoder's come the same way."""
    return any("cross_attn" in matrix.owner for block in reader._blocks for matrix in block.matrices)


def load(checkpoint: Path, told: list[Stage]) -> Pipeline:
    return Pipeline.load(
        checkpoint, model=checkpoint, profile="cpu", device="cpu", request=REQUEST, on_stage=told.append
    )


def test_loading_does_not_wait_for_the_blocks(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are on their way when it ends, and the first forward waits for each; the video is the same."""
    with load(tiny_checkpoint, []) as pipe:
        expected = [*pipe.stages(REQUEST)][-1].video
    asked, go_on, fill = threading.Event(), threading.Event(), PieceReader.fill

    def slow(reader: PieceReader, *given: Any) -> Any:
        if of_the_transformer(reader):
            asked.set()
            assert go_on.wait(SOON)
        return fill(reader, *given)

    monkeypatch.setattr(PieceReader, "fill", slow)
    told: list[Stage] = []
    with load(tiny_checkpoint, told) as pipe:
        assert [stage.step for stage in told] == sorted(stage.step for stage in told)
        assert told[-1].step == told[-1].steps and told[-1].bytes > 0
        assert pipe.plan is not None and not pipe.plan.blocks.slots
        stages = pipe.stages(REQUEST)
        assert next(stages).phase == "text"  # with none of the blocks there
        go_on.set()
        assert asked.wait(SOON)
        video = [*stages][-1].video
    assert video is not None and expected is not None and expected.frames.std() > 1
    assert (video.frames == expected.frames).all()


def test_a_fault_in_a_block_is_told_at_its_turn(
    small: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = PieceReader.fill

    def broken(reader: PieceReader, *given: Any) -> Any:
        if of_the_transformer(reader):
            raise WeightsError("block_1.safetensors ends early.")
        return fill(reader, *given)

    with monkeypatch.context() as fault:
        fault.setattr(PieceReader, "fill", broken)
        result = small("--output", "fox.mp4")
    assert result.exit_code == 3 and "error: block_1.safetensors ends early." in result.stderr
    assert [path.name for path in workplace.iterdir()] == ["fox.run.safetensors"]


@pytest.mark.parametrize("elsewhere", ["/packages", None])
def test_what_measures_a_start_keeps_where_packages_are(
    monkeypatch: pytest.MonkeyPatch, elsewhere: str | None
) -> None:
    from tests.gpu import measure_start

    monkeypatch.delenv("PYTHONPATH", raising=False)
    if elsewhere is not None:
        monkeypatch.setenv("PYTHONPATH", elsewhere)
    paths = measure_start.environment()["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(measure_start.ROOT), *filter(None, [elsewhere])]


def test_a_start_that_runs_out_of_memory_begins_anew(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks were on their way: they leave before a leaner plan is followed."""
    honest, calls = loading.load_vae, iter(range(10))

    def short(*given: Any, **named: Any) -> Any:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 320.00 MiB.")
        readers = [one for one in threading.enumerate() if one.name.startswith("weights-")]
        assert len(readers) <= 8  # of two streams, the text encoder's and the blocks'
        return honest(*given, **named)

    monkeypatch.setattr(loading, "load_vae", short)
    with load(tiny_checkpoint, []) as pipe:
        video = [*pipe.stages(REQUEST)][-1].video
        again = [*pipe.stages(REQUEST)][-1].video
    assert video is not None and len(video.metadata["stepped_down"]) == 1
    assert again is not None and "stepped_down" not in again.metadata  # nothing did in the second
    assert again.metadata["plan"] == video.metadata["plan"]
