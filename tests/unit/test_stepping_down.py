"""Memory that runs out in spite of the plan: a leaner plan, the same video. And a limit of RAM that holds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.errors import OutOfMemoryError
from runtime.memory.plan import Plan
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.stages import Stage
from runtime.transformer import Transformer
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
REQUEST = Request(prompt=tiny.PROMPTS[0], **tiny.SMALL)  # type: ignore[arg-type]


@pytest.fixture
def load(tiny_checkpoint: Path) -> Iterator[Callable[[], Pipeline]]:
    opened: list[Pipeline] = []

    def loaded() -> Pipeline:
        pipe = Pipeline.load(
            tiny_checkpoint, model=tiny_checkpoint, profile="cpu", device="cpu", request=REQUEST
        )
        opened.append(pipe)
        return pipe

    yield loaded
    for pipe in opened:
        pipe.close()


def exhausted() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 320.00 MiB. GPU 0 has ...")


def run(pipe: Pipeline) -> list[Stage]:
    return [*pipe.stages(REQUEST)]


def failing(times: int, method: Any) -> Any:
    """`method`, which runs out of memory the first `times` times."""
    left = [times]

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise exhausted()
        return method(*args, **kwargs)

    return sometimes


@pytest.mark.parametrize("times", [1, 2])
def test_a_denoise_step_is_repeated_on_a_leaner_plan(
    load: Callable[[], Pipeline], monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    whole = run(load())[-1].video
    pipe = load()
    before = pipe.plan
    monkeypatch.setattr(Transformer, "velocity", failing(times, Transformer.velocity))
    stages = run(pipe)
    after = pipe.plan
    assert isinstance(before, Plan) and isinstance(after, Plan) and whole is not None
    assert sum(after.parts["denoise"].values()) < sum(before.parts["denoise"].values())
    notes = [note for stage in stages for note in stage.notes]
    assert len([note for note in notes if "memory ran out in the denoise phase" in note]) == times
    video = stages[-1].video
    assert video is not None and len(video.metadata["stepped_down"]) == times
    difference = int(np.abs(video.frames.astype(int) - whole.frames.astype(int)).max())
    print(f"after {times} steps down: frames differ by {difference} of 255")
    assert difference <= 1  # shorter slices of tokens may round otherwise, nothing else changes
    again = run(pipe)[-1].video  # on the leaner plan, to which it did not have to step down
    assert again is not None and "stepped_down" not in again.metadata
    assert again.metadata["plan"] == video.metadata["plan"]


def test_a_decode_begins_again_with_smaller_tiles(
    load: Callable[[], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    import runtime.frames

    whole = run(load())[-1].video
    decode_pieces = runtime.frames.decode_pieces
    calls: list[str] = []

    def half_way(vae: Any, latents: Any, rung: Any) -> Iterator[Any]:
        calls.append(rung.name)
        for number, piece in enumerate(decode_pieces(vae, latents, rung)):
            if len(calls) == 1 and number == 1:
                raise exhausted()
            yield piece

    monkeypatch.setattr(runtime.frames, "decode_pieces", half_way)
    pipe = load()
    stages = run(pipe)
    video = stages[-1].video
    assert video is not None and whole is not None and len(calls) == 2
    assert video.metadata["stepped_down"][0].startswith("decode: ")
    # The first thing to go is what the transformer holds: then the rung, and with it every bit, is the same.
    most = 0 if calls[1] == calls[0] else 1
    assert int(np.abs(video.frames.astype(int) - whole.frames.astype(int)).max()) <= most


def test_a_decode_steps_down_rung_by_rung_while_the_blocks_are_gone(
    load: Callable[[], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else has the memory that the blocks had: no plan brings them back before the next run."""
    import runtime.frames

    request = Request(prompt=tiny.PROMPTS[0], height=64, width=96, frames=5)  # of two rungs
    whole = [*load().stages(request)][-1].video
    pipe, attempts = load(), list[tuple[str, int]]()
    decode_pieces, stream = runtime.frames.decode_pieces, pipe.parts.stream  # type: ignore[attr-defined]
    allocate = stream._feeder.lane.allocate

    def allocated(nbytes: int) -> Any:
        if len(attempts) in (2, 3):
            raise exhausted()
        return allocate(nbytes)

    def short(vae: Any, latents: Any, rung: Any) -> Iterator[Any]:
        attempts.append((rung.name, stream.device_bytes))
        if len(attempts) <= 3:
            raise exhausted()
        yield from decode_pieces(vae, latents, rung)

    monkeypatch.setattr(stream._feeder.lane, "allocate", allocated)
    monkeypatch.setattr(runtime.frames, "decode_pieces", short)
    video = [*pipe.stages(request)][-1].video
    names, held = zip(*attempts, strict=True)
    assert video is not None and whole is not None and len(video.metadata["stepped_down"]) == 3
    assert held[0] > 0 and set(held[1:]) == {0}
    assert names[:3] == ("whole",) * 3 and names[3] != "whole", "no step is passed over"
    assert int(np.abs(video.frames.astype(int) - whole.frames.astype(int)).max()) <= 1
    again = [*pipe.stages(request)][-1].video  # the blocks come back
    assert again is not None and stream.device_bytes == 0
    assert (again.frames == video.frames).all()


def test_a_leaner_plan_that_does_not_fit_either_is_passed_over(
    load: Callable[[], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load()
    monkeypatch.setattr(Transformer, "velocity", failing(1, Transformer.velocity))
    monkeypatch.setattr(pipe.parts, "follow", failing(1, pipe.parts.follow))
    video = run(pipe)[-1].video
    assert video is not None and len(video.metadata["stepped_down"]) == 2


def test_what_is_no_shortage_of_memory_is_not_tried_again(
    load: Callable[[], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Transformer, "velocity", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        run(load())
    assert len(calls) == 1


def test_no_rung_left_is_one_sentence(load: Callable[[], Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transformer, "velocity", failing(1000, Transformer.velocity))
    with pytest.raises(OutOfMemoryError, match=r"no leaner way left.*--frames"):
        run(load())


# ------------------------------------------------------------------------------------- a limit of RAM

MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def limited() -> Iterator[Callable[[int], Callable[[], None]]]:
    """limited(bytes) is what a child runs first to live in a cgroup of so much memory."""
    place = MEMORY / f"t2v-test-{os.getpid()}"
    try:
        place.mkdir()
        (place / "memory.limit_in_bytes").read_text()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")

    def entering(nbytes: int) -> Callable[[], None]:
        (place / "memory.limit_in_bytes").write_text(str(nbytes))
        return lambda: (place / "cgroup.procs").write_text(str(os.getpid())) and None

    yield entering
    place.rmdir()


@pytest.mark.parametrize(("limit", "code"), [(1 << 30, 0), (300 << 20, 4)])
def test_a_run_in_a_cgroup_fits_or_is_refused(
    limited: Callable[[int], Callable[[], None]], tmp_path: Path, limit: int, code: int
) -> None:
    arguments = ["--model", "demo", "--device", "cpu", "--json", "--cache", "none", "--output", "a.mp4"]
    done = subprocess.run(
        [sys.executable, "-m", "entrypoint", "generate", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limited(limit),
    )
    assert done.returncode == code, done.stderr  # -9 would be the kernel's answer
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["event"] == "result") if code == 0 else ("cgroup" in last["message"])
