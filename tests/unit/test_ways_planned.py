"""An attention in 8 bits and the plan: it is used where there is room for its copies, and left where not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.layers.backends import BACKENDS, Backend, sdpa
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.ways import FORMULA, Ways
from tests import tiny

REQUEST = Request(prompt=tiny.PROMPTS[0], **tiny.SMALL)  # type: ignore[arg-type]
LADDER = ("eight", "sdpa", FORMULA)


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "eight", Backend("eight", 8, lambda _: sdpa, lowest=(0, 0)))


def test_room_for_8_bits_or_none() -> None:
    ways = Ways("cpu", LADDER)
    assert ways.eight_bits == "eight"
    assert not ways.keep_to("eight") and ways.name == "eight" and not ways.take_notes()
    assert ways.keep_to("") and ways.name == "sdpa" and ways.eight_bits == ""
    assert not ways.keep_to("") and len(ways.take_notes()) == 1 and not ways.fell_back


@pytest.mark.parametrize("attention", ["eight", ""])
def test_a_run_keeps_to_its_plan(tiny_checkpoint: Path, attention: str) -> None:
    """The plan is taken for one of a GPU after loading; nothing else of it matters to a run on the CPU."""
    with Pipeline.load(
        tiny_checkpoint, model=tiny_checkpoint, profile="cpu", device="cpu", request=REQUEST
    ) as pipe:
        plain = [*pipe.stages(REQUEST)][-1].video
        assert pipe.fitting.plan is not None and plain is not None
        pipe.fitting.plan = replace(pipe.fitting.plan, device="cuda", attention=attention)
        pipe.ways = Ways("cpu", LADDER)
        stages = [*pipe.stages(REQUEST)]
        video = stages[-1].video
    assert video is not None and np.array_equal(video.frames, plain.frames)
    assert video.metadata["ways"]["attention"] == (attention or "sdpa")
    notes = [note for stage in stages for note in stage.notes]
    assert any("no room for the copies of attention eight" in note for note in notes) == (not attention)
