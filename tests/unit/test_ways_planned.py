"""An attention in 8 bits and the plan: it is used where there is room for its copies, and left where not."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.layers.backends import BACKENDS, LAST_RESORT, Backend, sdpa
from runtime.memory.plan import Plan
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.ways import Ways
from tests import tiny

REQUEST = Request(prompt=tiny.PROMPTS[0], **tiny.SMALL)  # type: ignore[arg-type]
LADDER = ("eight", "sdpa", LAST_RESORT)


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "eight", Backend("eight", 8, lambda _: sdpa, lowest=(0, 0)))


def plan(device: str, attention: str) -> Plan:
    """What a way looks at, of a plan."""
    return SimpleNamespace(device=device, attention=attention)  # type: ignore[return-value]


def test_room_for_8_bits_or_none() -> None:
    ways = Ways("cpu", LADDER)
    assert ways.eight_bits == "eight"
    for plenty in (plan("cuda", "eight"), plan("cpu", ""), None):
        assert not ways.keep_to(plenty) and ways.name == "eight" and not ways.take_notes()
    assert ways.keep_to(plan("cuda", "")) and ways.name == "sdpa" and ways.eight_bits == ""
    assert not ways.keep_to(plan("cuda", "")) and len(ways.take_notes()) == 1 and not ways.fell_back


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
