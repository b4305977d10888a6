"""What happened when: reads, copies, computation and waits of a stream, as spans and as a picture.

Off by default. While it is on, each block and each piece costs two events more; reading the spans
synchronizes once, at the end. Times on the GPU and on the host meet at an event that was waited for at the
start.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch

LANES = ("read", "copy", "compute", "wait")


@dataclass(frozen=True)
class Span:
    """`label` was done from `start` to `end`, seconds after the trace began. lane: one of LANES."""

    lane: str
    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Mark:
    """A moment: seconds on the host's clock, or an event on a GPU."""

    host: float = 0.0
    event: Any = None


class Trace:
    """Collects spans from any thread. device: the GPU whose copies and computation are meant, or cpu."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._marks: list[tuple[str, str, Mark, Mark]] = []
        self._lock = threading.Lock()
        self._base: Any = None
        if self.device.type == "cuda":
            self._base = torch.cuda.Event(enable_timing=True)
            self._base.record(torch.cuda.current_stream(self.device))
            self._base.synchronize()
        self._began = time.perf_counter()

    def mark_host(self) -> Mark:
        """Now, on the host."""
        return Mark(time.perf_counter())

    def mark_device(self, stream: Any = None) -> Mark:
        """The moment when `stream` (the current one) comes to this point; now, on the CPU."""
        if self._base is None:
            return self.mark_host()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream if stream is not None else torch.cuda.current_stream(self.device))
        return Mark(event=event)

    def add(self, lane: str, label: str, begin: Mark, end: Mark) -> None:
        """Keep one span."""
        with self._lock:
            self._marks.append((lane, label, begin, end))

    def spans(self) -> list[Span]:
        """All spans so far, by their start. Waits for the GPU."""
        if self._base is not None:
            torch.cuda.synchronize(self.device)
        with self._lock:
            marks = list(self._marks)
        spans = [Span(lane, label, self._seconds(a), self._seconds(b)) for lane, label, a, b in marks]
        return sorted(spans, key=lambda span: (span.start, span.end))

    def _seconds(self, mark: Mark) -> float:
        if mark.event is None:
            return mark.host - self._began
        return self._base.elapsed_time(mark.event) / 1000


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The time that spans cover together, as intervals that do not touch, ascending."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((span.start, span.end) for span in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def seconds_of(spans: Sequence[Span], lane: str) -> float:
    """Seconds in which at least one span of `lane` runs."""
    return sum(end - start for start, end in union(span for span in spans if span.lane == lane))


def overlap(spans: Sequence[Span]) -> float:
    """The part of all copying time during which the device computes, 0 to 1; 1 without copies.

    What copies cost is the rest: time in which something was copied and nothing computed.
    """
    copies = union(span for span in spans if span.lane == "copy")
    computing = union(span for span in spans if span.lane == "compute")
    total = sum(end - start for start, end in copies)
    if total <= 0:
        return 1.0
    both = 0.0
    first = 0
    for start, end in copies:
        while first < len(computing) and computing[first][1] <= start:
            first += 1
        for begin, finish in computing[first:]:
            if begin >= end:
                break
            both += max(0.0, min(end, finish) - max(start, begin))
    return both / total


_NAMES = {
    "read": "disk and RAM reads",
    "copy": "copies to the GPU",
    "compute": "computation",
    "wait": "host waits",
}
_COLOURS = {"read": ("#c9a227", "#e3c766"), "copy": ("#2f6f9f", "#6fa8d0"), "compute": ("#3f7d4f", "#7fb58c")}
_COLOURS["wait"] = ("#a33b3b", "#cf7f7f")
_LEFT, _RIGHT, _TOP, _ROW, _BAR, _CHARACTER = 150, 20, 50, 26, 18, 6.2


def draw_timeline(spans: Sequence[Span], title: str = "", width: int = 1200) -> str:
    """An SVG picture: time to the right, a lane for each kind of span, rows in it where they overlap.

    width: of the picture, pixels. Labels alternate between two shades; spans of one label that touch are one
    bar; a label stands in its bar where it fits, and is the bar's tooltip. Raises ValueError without spans.
    """
    if not spans:
        raise ValueError("no spans: record a pass first")
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    scale = (width - _LEFT - _RIGHT) / max(end - begin, 1e-9)
    parts, y = [], _TOP
    for lane in LANES:
        rows = _rows([span for span in spans if span.lane == lane])
        if not rows:
            continue
        labels = list(dict.fromkeys(span.label for span in spans if span.lane == lane))
        shade = {label: _COLOURS[lane][number % 2] for number, label in enumerate(labels)}
        parts.append(f'<text class="lane" x="{_LEFT - 10}" y="{y + _BAR - 4}">{_NAMES[lane]}</text>')
        for row in rows:
            for span in _joined(row, gap=1 / scale):
                x, length = _LEFT + (span.start - begin) * scale, max((span.end - span.start) * scale, 0.5)
                parts.append(_bar(span, x, y, length, shade[span.label]))
            y += _ROW
        y += _ROW // 3
    grid = _axis(begin, end, scale, y)
    share = f"{overlap(spans):.1%} of the copying time is hidden behind computation"
    heading = f"{escape(title)}: {share}" if title else share[0].upper() + share[1:]
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 34}" width="{width}" '
            f'height="{y + 34}" font-family="sans-serif" font-size="11">',
            "<style>.lane{text-anchor:end;font-weight:bold}.tick{text-anchor:middle;fill:#555}"
            ".in{fill:#fff;text-anchor:middle;pointer-events:none}</style>",
            f'<rect width="{width}" height="{y + 34}" fill="#fff"/>',
            f'<text x="{_LEFT}" y="24" font-size="14">{heading}</text>',
            *grid,
            *parts,
            "</svg>",
            "",
        )
    )


def _rows(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans in as few rows as keep them apart, each row ascending."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        free = next((row for row in rows if row[-1].end <= span.start), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return rows


def _joined(row: Sequence[Span], gap: float) -> list[Span]:
    """Neighbours of one label, with less than `gap` seconds between them, as one."""
    joined: list[Span] = []
    for span in row:
        last = joined[-1] if joined else None
        if last is not None and last.label == span.label and span.start - last.end < gap:
            joined[-1] = replace(last, end=span.end)
        else:
            joined.append(span)
    return joined


def _bar(span: Span, x: float, y: float, length: float, colour: str) -> str:
    label = escape(span.label)
    tip = f"{label}: {span.start * 1000:.2f} to {span.end * 1000:.2f} ms"
    text = ""
    if length > _CHARACTER * len(span.label) + 6:
        text = f'<text class="in" x="{x + length / 2:.1f}" y="{y + _BAR - 5}">{label}</text>'
    return (
        f'<g><title>{tip}</title><rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{_BAR}" '
        f'fill="{colour}"/>{text}</g>'
    )


def _axis(begin: float, end: float, scale: float, bottom: float) -> list[str]:
    """Lines at round times, about ten, with their milliseconds."""
    span = max(end - begin, 1e-9)
    exponent = 10.0 ** (len(f"{int(span * 1e9)}") - 11)  # a power of ten of which 1 to 100 fit into the span
    step = next(
        exponent * factor for factor in (1, 2, 5, 10, 20, 50, 100) if span / (exponent * factor) <= 12
    )
    lines = []
    for number in range(int(span / step) + 1):
        x = _LEFT + number * step * scale
        lines.append(f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        lines.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}">{number * step * 1000:.6g} ms</text>')
    return lines
