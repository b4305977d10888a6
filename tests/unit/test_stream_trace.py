"""What a trace records and how it is drawn."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from runtime.memory.trace import Span, Trace, draw_timeline, overlap, seconds_of
from tests.unit.stream_fixtures import Faults, Placed, inputs_of, streamed, written


def test_a_pass_is_recorded(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, "transformer", "fp8", "blocks")
    with streamed(checkpoint, Placed((1,), (), 1), system=Faults(delay=0.001)) as (model, stream):
        stream.expect(2)
        with torch.inference_mode():
            model(*inputs_of("transformer"))
            stream.trace = trace = Trace()
            model(*inputs_of("transformer"))
        stream.trace = None
        spans = trace.spans()
        recorded = len(spans)
        with torch.inference_mode():
            model(*inputs_of("transformer"))
        assert len(trace.spans()) == recorded  # it is off again
    computed = [span for span in spans if span.lane == "compute"]
    assert [span.label for span in computed] == ["0", "1", "2"]
    assert all(a.end <= b.start for a, b in itertools.pairwise(computed))
    assert all(span.end >= span.start for span in spans)
    assert {span.label for span in spans if span.lane in ("read", "copy")} == {"0", "2"} or {
        span.label for span in spans if span.lane in ("read", "copy")
    } == {"2"}  # block 0 may have come before the trace began
    assert any(span.lane == "wait" for span in spans)
    last = max(span.end for span in spans if span.lane == "copy" and span.label == "2")
    assert last <= computed[2].start
    bars = draw_timeline(spans, "a pass").count("<title>")
    assert len({(span.lane, span.label) for span in spans}) <= bars <= len(spans)


def test_overlap_is_the_share_of_copying_that_is_hidden() -> None:
    compute = [Span("compute", "0", 0.0, 1.0), Span("compute", "1", 1.5, 2.0)]
    assert overlap(compute) == 1.0
    assert overlap([*compute, Span("copy", "1", 0.2, 0.6)]) == 1.0
    assert overlap([*compute, Span("copy", "1", 0.75, 1.25)]) == pytest.approx(0.5)
    # copies side by side count once; this one spans the gap and what follows
    both = [*compute, Span("copy", "1", 0.9, 1.7), Span("copy", "1", 1.0, 1.6), Span("copy", "2", 1.9, 2.4)]
    assert overlap(both) == pytest.approx((0.1 + 0.2 + 0.1) / (0.8 + 0.5))
    assert seconds_of(both, "copy") == pytest.approx(1.3)
    assert overlap([Span("copy", "1", 0.0, 1.0)]) == 0.0


def random_spans(seed: int, seconds: float) -> list[Span]:
    generator = torch.Generator().manual_seed(seed)
    spans = []
    for lane in ("read", "copy", "compute", "wait"):
        starts = torch.rand(30, generator=generator) * seconds
        lengths = torch.rand(30, generator=generator) * seconds / 10
        spans += [
            Span(lane, f"{i} & <b>", float(s), float(s + d))
            for i, (s, d) in enumerate(zip(starts, lengths, strict=True))
        ]
    return spans


@pytest.mark.parametrize("seconds", [1e-5, 0.004, 0.7, 3.0, 95.0, 3600.0])
def test_the_picture_is_sound(seconds: float) -> None:
    spans = random_spans(1, seconds)
    svg = draw_timeline(spans, "four <lanes>", width=1000)
    tree = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    bars = [rect for group in tree.iter(f"{name}g") for rect in group.iter(f"{name}rect")]
    assert len(bars) == len(spans)  # no two of one lane have the same label
    width, height = float(tree.attrib["width"]), float(tree.attrib["height"])
    rows: dict[str, list[tuple[float, float]]] = {}
    for bar in bars:
        x, y, length = (float(bar.attrib[key]) for key in ("x", "y", "width"))
        assert x >= 150 and x + length <= width - 19 and y > 0 and y + 18 < height
        rows.setdefault(bar.attrib["y"], []).append((x, x + length))
    for row in rows.values():  # no bar hides another
        row.sort()
        assert all(a[1] <= b[0] + 0.7 for a, b in itertools.pairwise(row))
    lanes = [text.text for text in tree.iter(f"{name}text") if text.attrib.get("class") == "lane"]
    assert lanes == ["disk and RAM reads", "copies to the GPU", "computation", "host waits"]
    ticks = [text.text for text in tree.iter(f"{name}text") if text.attrib.get("class") == "tick"]
    assert 4 <= len(ticks) <= 14 and ticks[0] == "0 ms" and len(set(ticks)) == len(ticks)
    heading = next(text.text for text in tree.iter(f"{name}text") if text.attrib.get("font-size") == "14")
    assert heading is not None and re.fullmatch(
        r"four <lanes>: \d+\.\d% of the copying time is hidden behind computation", heading
    )


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="no spans"):
        draw_timeline([])
