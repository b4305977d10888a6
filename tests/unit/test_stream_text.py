"""A text encoder that stays in RAM between prompts: the same states, read once, and gone when it is to go."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.memory.plan import Plan
from runtime.memory.ring import Ring
from runtime.memory.stream import BlockStream, StreamCounts
from runtime.parts import PlannedParts
from runtime.pipeline import Pipeline
from runtime.request import Request
from tests import tiny
from tests.unit.stream_fixtures import Driver

REQUEST = Request(prompt=tiny.PROMPTS[0], **tiny.SMALL)  # type: ignore[arg-type]


@pytest.fixture
def pipe(tiny_checkpoint: Path) -> Iterator[Pipeline]:
    with Pipeline.load(
        tiny_checkpoint, model=tiny_checkpoint, profile="cpu", device="cpu", request=REQUEST
    ) as opened:
        yield opened


@pytest.fixture
def driver(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The ring of the text encoder is pinned, as on a GPU."""
    driver = Driver()
    parts = parts_of(pipe)
    ring = Ring(parts.ring.chunk_bytes, parts.ring.chunks, pinned=True, driver=driver)
    monkeypatch.setattr(parts, "_ring", ring)
    monkeypatch.setattr("runtime.memory.stream.is_wsl", lambda: False)
    yield driver
    ring.close()
    assert not driver.pinned


def parts_of(pipe: Pipeline) -> PlannedParts:
    assert isinstance(pipe.parts, PlannedParts)
    return pipe.parts


def follow(pipe: Pipeline, text: Any) -> Plan:
    assert pipe.plan is not None
    plan = replace(pipe.plan, text=text)
    pipe.fitting.plan = plan
    pipe.parts.follow(plan)
    return plan


def encoded(pipe: Pipeline, number: int = 0) -> torch.Tensor:
    return pipe._encoding().encode(pipe.tokenizer(tiny.PROMPTS[number]))


def stream_of(pipe: Pipeline) -> BlockStream:
    kept = parts_of(pipe)._encoder
    assert kept is not None
    return kept[1]


def read(counts: StreamCounts) -> int:
    return counts.reads.disk_bytes + counts.reads.cached_bytes


def stored(stream: BlockStream) -> int:
    return sum(block.stored_bytes for block in stream._stored)


def payload(stream: BlockStream) -> int:
    return sum(matrix.nbytes for block in stream._stored for matrix in block.matrices)


def test_later_prompts_read_none_of_its_blocks(pipe: Pipeline) -> None:
    wanted = []
    for text in ("resident", "streamed"):
        follow(pipe, text)
        wanted.append([encoded(pipe, number) for number in (0, 1)])
    follow(pipe, "cached")
    before = 0
    for number in (0, 1, 0):
        states = encoded(pipe, number)
        for others in wanted:
            print(f"prompt {number}: largest difference {float((states - others[number]).abs().max())}")
            assert torch.equal(states, others[number])
        stream = stream_of(pipe)
        blocks, now = 0 if before else stored(stream), read(stream.counts)
        rows = 32 * 64 * 4  # a prompt's tokens, of the table
        assert blocks <= now - before <= blocks + rows < blocks + stored(stream)
        before = now
        assert stream.device_bytes == 0 and stream.cache_bytes >= stored(stream)
    assert stream.counts.cache_bytes == 2 * payload(stream)
    assert stream.pinned_bytes == 0 and "not pinned" in stream.pin_refusal  # the CPU's ring is not


def test_it_is_pinned_after_the_first_prompt_and_unpinned_when_it_goes(
    pipe: Pipeline, driver: Driver
) -> None:
    ring = sum(driver.pinned.values())
    follow(pipe, "streamed")
    wanted = [encoded(pipe, number) for number in (0, 1)]
    for end in ("streamed", "known", "resident", "close"):
        follow(pipe, "cached")
        for number in (0, 1, 1):
            assert torch.equal(encoded(pipe, number), wanted[number])
            stream_of(pipe)._pinner.wait()
            assert stream_of(pipe).pinned_bytes == stream_of(pipe).cache_bytes > 0
        kept, held = parts_of(pipe)._encoder, sum(driver.pinned.values())
        assert held >= ring + stream_of(pipe).cache_bytes
        follow(pipe, "cached")  # for another video
        assert parts_of(pipe)._encoder is kept and sum(driver.pinned.values()) == held
        if end == "close":
            parts_of(pipe).close()
            assert not driver.pinned
        else:
            follow(pipe, end)
            assert parts_of(pipe)._encoder is None and sum(driver.pinned.values()) == ring
    assert not [thread for thread in threading.enumerate() if thread.name == "weights-pin"]


def test_memory_that_runs_out_while_it_visits_leaves_nothing_on_the_device(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(pipe, "resident")
    wanted = encoded(pipe)
    follow(pipe, "cached")
    encoded(pipe)
    stream, calls = stream_of(pipe), list[int]()
    allocate = stream._feeder.lane.allocate

    def short(nbytes: int) -> Any:
        calls.append(nbytes)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(nbytes)

    monkeypatch.setattr(stream._feeder.lane, "allocate", short)
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(torch.OutOfMemoryError), parts_of(pipe).text_encoder() as encoder:
        encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    assert stream.device_bytes == 0
    assert torch.equal(encoded(pipe), wanted) and stream_of(pipe) is stream


def test_a_guided_run_reads_the_encoder_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = pipe.manifest.sampling.model_copy(update={"distilled": False, "guidance": 4.0})
    pipe.manifest = pipe.manifest.model_copy(update={"sampling": sampling})
    whole = [*pipe.stages(REQUEST)][-1].video  # plans for it
    follow(pipe, "cached")
    video = [*pipe.stages(REQUEST)][-1].video
    assert video is not None and whole is not None and (video.frames == whole.frames).all()
    assert video.metadata["plan"]["text"] == "cached"
    stream = stream_of(pipe)
    assert stream.counts.cache_bytes == payload(stream)
    assert stream.counts.copied_bytes == 2 * payload(stream)
