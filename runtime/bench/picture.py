"""Where the time of a forward goes, as a picture: one pair of bars for each model and size. No torch.

Drawn from the JSON of `t2v bench`, so that a bench on one machine can be drawn on another. The first bar is
the way in use, the second the reference in plain torch. What the kernels leave of a forward is `between
kernels`; what the guard adds is `guard`; a bar without a profile stays whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from runtime.errors import RequestError

PROFILED = ("self attention", "cross attention", "attention", "products", "everything else")
REFERENCE = "reference, "
"""Stands before the name of a row that tells of the reference."""
FORWARD, UNGUARDED = "one forward", "the same without the guard's samples"
GAPS, GUARD, WHOLE = "between kernels", "guard", "not told apart"

_COLOURS = {
    "self attention": "#2f6f9f",
    "cross attention": "#6fa8d0",
    "attention": "#2f6f9f",
    "products": "#3f7d4f",
    "everything else": "#b8860b",
    GAPS: "#9a9a9a",
    GUARD: "#a33b3b",
    WHOLE: "#777",
}
_WIDTH, _LEFT, _RIGHT, _TOP, _BAR, _ROW, _HEAD, _CHARACTER = 1200, 130, 110, 62, 26, 34, 30, 6.2


@dataclass(frozen=True)
class Bar:
    """One forward: what it was, its seconds, and its parts in seconds, the first at the left."""

    name: str
    seconds: float
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Pair:
    """The bars of one model and size."""

    title: str
    bars: tuple[Bar, ...]


def pairs_of(found: Mapping[str, Any]) -> list[Pair]:
    """The bars of every forward that a bench measured, in its order.

    found: the JSON object of `t2v bench`. Raises RequestError for what is none, or has no forward.
    """
    try:
        pairs = [*_pairs(found)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"what is to be drawn is not the JSON of a bench ({type(error).__name__}: {error}); expected a "
            "file that t2v bench --json has written"
        ) from error
    if not pairs:
        raise RequestError("this bench has no forward to draw; measure one with t2v bench --only forward")
    return pairs


def _pairs(found: Mapping[str, Any]) -> Iterator[Pair]:
    sizes: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in found["rows"]:
        if row["part"] == "forward":
            sizes.setdefault((row["model"], row["size"]), {})[row["what"]] = row
    for (model, size), rows in sizes.items():
        if FORWARD in rows:
            way = str(rows[FORWARD].get("note", "")).partition(";")[0]
            yield Pair(", ".join(filter(None, (f"{model} {size}", way))), tuple(_bars(rows)))


def _bars(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Bar]:
    whole = _median(rows[FORWARD])
    bare = _median(rows[UNGUARDED]) if UNGUARDED in rows else whole
    guard = [(GUARD, whole - bare)] if whole > bare else []
    yield Bar("in use", whole, (*_parts(rows, bare), *guard))
    if "reference" in rows[FORWARD]:
        plain = float(rows[FORWARD]["reference"]["median"])
        yield Bar("plain torch", plain, tuple(_parts(rows, plain, REFERENCE)))


def _parts(
    rows: Mapping[str, Mapping[str, Any]], whole: float, whose: str = ""
) -> Sequence[tuple[str, float]]:
    """What the profiler saw, and what that leaves of `whole` seconds."""
    names = {part: f"{whose}profiled: {part}" for part in PROFILED}
    seen = [(part, _median(rows[name])) for part, name in names.items() if name in rows]
    if not seen:
        return [(WHOLE, whole)]
    gaps = whole - sum(seconds for _, seconds in seen)
    return [*seen, (GAPS, gaps)] if gaps > 0 else seen


def _median(row: Mapping[str, Any]) -> float:
    return float(row["found"]["median"])


# --- drawing ---


def draw_forwards(found: Mapping[str, Any]) -> str:
    """An SVG picture of `pairs_of(found)`, each pair on a scale of its own. RequestError as there."""
    pairs = pairs_of(found)
    drawn, y = list[str](), float(_TOP)
    for pair in pairs:
        drawn.append(f'<text x="{_LEFT}" y="{y + 14}">{escape(pair.title)}</text>')
        y += _HEAD - 8
        longest = max(max(bar.seconds, sum(seconds for _, seconds in bar.parts)) for bar in pair.bars)
        scale = (_WIDTH - _LEFT - _RIGHT) / max(longest, 1e-9)
        for bar in pair.bars:
            drawn += _drawn(bar, y, scale, pair.bars[-1].seconds)
            y += _ROW
        y += 8
    used = {part for pair in pairs for bar in pair.bars for part, _ in bar.parts}
    height = y + 28
    machine = found.get("machine", {})
    about = ", ".join(
        str(machine[name]) if name == "card" else f"{name} {machine[name]}"
        for name in ("card", "torch", "driver", "triton")
        if name in machine
    )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
            f'height="{height:.0f}" font-family="sans-serif" font-size="12">',
            "<style>.name{text-anchor:end;font-weight:bold}"
            ".in{fill:#fff;text-anchor:middle;pointer-events:none}</style>",
            f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#fff"/>',
            f'<text x="{_LEFT}" y="24" font-size="15">Where the time of one denoise forward goes</text>',
            f'<text x="{_LEFT}" y="44" fill="#555">{escape(about)}</text>',
            *drawn,
            *_legend([part for part in _COLOURS if part in used], y + 6),
            "</svg>",
            "",
        )
    )


def _drawn(bar: Bar, y: float, scale: float, reference: float) -> Iterator[str]:
    yield f'<text class="name" x="{_LEFT - 10}" y="{y + _BAR - 9}">{escape(bar.name)}</text>'
    x = float(_LEFT)
    for part, seconds in bar.parts:
        length = seconds * scale
        label = next(
            (text for text in (f"{part} {_words(seconds)}", _words(seconds)) if _fits(text, length)), ""
        )
        text = f'<text class="in" x="{x + length / 2:.1f}" y="{y + _BAR - 9}">{label}</text>' if label else ""
        yield (
            f"<g><title>{part}: {_words(seconds)}, {seconds / bar.seconds:.1%}</title>"
            f'<rect x="{x:.1f}" y="{y}" width="{max(length, 0.5):.1f}" height="{_BAR}" '
            f'fill="{_COLOURS[part]}"/>{text}</g>'
        )
        x += length
    ratio = f" ({reference / bar.seconds:.2f}x)" if bar.seconds != reference else ""
    yield f'<text x="{x + 8:.1f}" y="{y + _BAR - 9}">{_words(bar.seconds)}{ratio}</text>'


def _legend(parts: Sequence[str], y: float) -> Iterator[str]:
    x = float(_LEFT)
    for part in parts:
        yield f'<rect x="{x:.1f}" y="{y}" width="12" height="12" fill="{_COLOURS[part]}"/>'
        yield f'<text x="{x + 17:.1f}" y="{y + 11}">{part}</text>'
        x += 17 + _CHARACTER * len(part) + 24


def _fits(text: str, length: float) -> bool:
    return length > _CHARACTER * len(text) + 6


def _words(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
