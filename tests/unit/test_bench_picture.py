"""The picture of a bench: what its bars are made of, how long they are drawn, and from which files."""

import json
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from runtime.bench.picture import FORWARD, GAPS, GUARD, REFERENCE, UNGUARDED, WHOLE, draw_forwards, pairs_of
from runtime.errors import RequestError
from tests.conftest import Run

SVG = "{http://www.w3.org/2000/svg}"
PARTS = ("self attention", "cross attention", "products", "everything else")


def row(what: str, seconds: float, size: str = "480x832x81", **more: object) -> dict[str, Any]:
    found = {"part": "forward", "what": what, "model": "big", "size": size, "unit": "s"}
    return found | {"found": {"median": seconds}} | more


def bench_of(drawn: random.Random, *, profiled: bool = True, gaps: float = 0.03) -> dict[str, Any]:
    """A bench of one forward with random parts, beside its reference."""
    own = {part: drawn.uniform(0.1, 1.5) for part in PARTS}
    plain = {part: drawn.uniform(0.5, 2.5) for part in PARTS}
    bare, reference = sum(own.values()) + gaps, sum(plain.values()) + gaps
    rows = [
        row(FORWARD, bare + 0.02, reference={"median": reference}, note="attention <8 bits>; all resident"),
        row(UNGUARDED, bare),
        {"part": "decode", "what": "warm, bytes included", "model": "big", "size": "480x832x81"},
    ]
    if profiled:
        rows += [row(f"profiled: {part}", seconds) for part, seconds in own.items()]
        rows += [row(f"{REFERENCE}profiled: {part}", seconds) for part, seconds in plain.items()]
    return {"event": "bench", "machine": {"card": "A & B", "torch": "2.11"}, "rows": rows}


@pytest.mark.parametrize("seed", range(3))
def test_the_parts_of_a_bar_are_the_forward(seed: int) -> None:
    found = bench_of(random.Random(seed))
    (pair,) = pairs_of(found)
    assert pair.title == "big 480x832x81, attention <8 bits>"
    mine, plain = pair.bars
    assert [part for part, _ in mine.parts] == [*PARTS, GAPS, GUARD]
    assert [part for part, _ in plain.parts] == [*PARTS, GAPS]  # the reference has no guard
    for bar in pair.bars:
        assert sum(seconds for _, seconds in bar.parts) == pytest.approx(bar.seconds)
    assert dict(mine.parts)[GUARD] == pytest.approx(0.02) and dict(plain.parts)[GAPS] == pytest.approx(0.03)
    assert dict(mine.parts)["products"] != dict(plain.parts)["products"]


def test_a_bar_without_a_profile_stays_whole() -> None:
    (pair,) = pairs_of(bench_of(random.Random(7), profiled=False))
    assert [[part for part, _ in bar.parts] for bar in pair.bars] == [[WHOLE, GUARD], [WHOLE]]


def test_kernels_that_overlap_leave_no_gaps() -> None:
    (pair,) = pairs_of(bench_of(random.Random(8), gaps=-0.05))
    assert all(GAPS not in dict(bar.parts) for bar in pair.bars)


def test_bars_are_as_long_as_their_seconds() -> None:
    found = bench_of(random.Random(9))
    found["rows"].append(row(FORWARD, 20.0, size="720x1280x81"))
    first, second = pairs_of(found)
    drawn = ElementTree.fromstring(draw_forwards(found))
    boxes = [float(one[1].attrib["width"]) for one in drawn.iter(f"{SVG}g")]
    seconds = [seconds for bar in first.bars for _, seconds in bar.parts]
    scale = 960 / max(bar.seconds for bar in first.bars)
    assert boxes[:-1] == pytest.approx([took * scale for took in seconds], abs=0.051)  # pixels, one decimal
    assert boxes[-1] == 960  # the other size has its own scale
    texts = [one.text or "" for one in drawn.iter(f"{SVG}text")]
    assert any("attention <8 bits>" in text for text in texts) and any("A & B" in text for text in texts)
    mine, plain = first.bars
    assert any(f"({plain.seconds / mine.seconds:.2f}x)" in text for text in texts)
    assert second.bars[0].parts == ((WHOLE, 20.0),)


@pytest.mark.parametrize(
    "wrong", [{}, {"rows": 3}, {"rows": [{"part": "forward"}]}, {"rows": [row(FORWARD, 1.0) | {"found": {}}]}]
)
def test_what_is_no_bench_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="not the JSON of a bench"):
        draw_forwards(wrong)
    with pytest.raises(RequestError, match="no forward to draw"):
        draw_forwards({"rows": [{"part": "text"}]})


# --- t2v bench --picture ---


def test_a_bench_is_drawn_at_its_end_and_again_from_its_json(
    t2v: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    first, again, report = tmp_path / "first.svg", tmp_path / "again.svg", tmp_path / "bench.json"
    fixed = ("--model", tiny_checkpoint, "--device", "cpu", "--sizes", "32x48x5", "--repeats", 1)
    done = t2v("bench", *fixed, "--only", "forward", "--json", report, "--picture", first)
    assert done.exit_code == 0, done.stderr
    done = t2v("bench", "--from", report, "--picture", again)
    assert done.exit_code == 0 and done.stdout.strip() == str(again)
    assert first.read_text() == again.read_text() and "32x48x5" in first.read_text()
    done = t2v("bench", "--from", report, "--picture", "/proc/no/picture.svg")
    assert done.exit_code == 2 and "cannot be written" in done.stderr


def test_what_cannot_be_drawn_is_one_sentence(t2v: Run, workplace: Path, tmp_path: Path) -> None:
    other, text = tmp_path / "other.json", tmp_path / "text.txt"
    other.write_text(json.dumps({"event": "result"}))
    text.write_bytes(b"\xff\x00 no text")
    for arguments, words in (
        (["--from", other], "name a file with --picture"),
        (["--from", other, "--picture", "a.svg"], "expected a file that t2v bench --json wrote"),
        (["--from", text, "--picture", "a.svg"], "it is not JSON"),
        (["--from", tmp_path / "none", "--picture", "a.svg"], "No such file"),
        (["--only", "text", "--picture", "a.svg"], "add forward to it"),
    ):
        done = t2v("bench", *arguments)
        assert done.exit_code == 2 and words in done.stderr, done.stderr
        assert done.stderr.count("error:") == 1
    assert list(workplace.iterdir()) == []
