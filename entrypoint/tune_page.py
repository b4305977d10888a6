"""The tables of `t2v tune`: attention and products as measured, what will be used, and the card meanwhile."""

import shutil
import sys
from collections.abc import Collection
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from entrypoint.events import emit
from entrypoint.gpu_checks import ATTENTION, attention_row
from entrypoint.table import aligned

if TYPE_CHECKING:
    from entrypoint.tune import Subject
    from runtime.bench.gauge import Summary
    from runtime.tuner import Multiplied
    from runtime.tuning_file import Attention

PRODUCTS = ("PRODUCT", "WAY", "MS", "TOPS", "ERROR", "")


class Page:
    """Gathers what is measured and shows it at the end; with `as_json` each as it comes."""

    def __init__(self, subject: "Subject", avoided: Collection[str], *, as_json: bool) -> None:
        self.subject, self.avoided, self.as_json = subject, set(avoided), as_json
        self._lines: list[str] = []
        self._products: list[tuple[str, ...]] = []
        self._gauges: list[str] = []
        self._width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None

    def attention(self, name: str, found: "Attention", gauge: "Summary | None") -> None:
        """The backends at one size."""
        from runtime.layers.backends import BACKENDS
        from runtime.tuning import winner

        used = winner(found.entries, found.tokens, found.keys, self.avoided)
        if self.as_json:
            fields = found.model_dump(exclude={"entries", "date", "won"})
            listed = [
                {
                    **one.model_dump(include={"name", "ok", "distance", "ms", "reason"}),
                    "bits": BACKENDS[one.name].bits,
                }
                for one in found.entries
            ]
            emit("attention", **fields, used=used, gauge=_as_dict(gauge), backends=listed)
            return
        rows = []
        for one in found.entries:
            state = "used" if one.name == used else "right" if one.ok else one.reason
            if one.ok and one.name in self.avoided:
                state = "left out: wrong numbers in a run before (--forget)"
            elif one.ok and one.ms is None and not one.reason:
                state = "the last resort, not timed"
            elif one.ok and one.reason:
                state = one.reason
            rows.append(attention_row(one.name, BACKENDS[one.name].bits, one.distance, one.ms, state))
        header = (name.upper(), *ATTENTION[1:])
        self._lines += [*_table(header, rows, (1, 2, 3), self._width), ""]
        self._gauge(name, gauge)

    def product(self, made: "Multiplied", gauge: "Summary | None") -> None:
        """The ways of one product."""
        product = made.product
        tiles = None if not made.tiles or made.tiles[0][1].milliseconds is None else str(made.tiles[0][0])
        if self.as_json:
            fields = product.model_dump(include={"dtype", "columns", "depth", "rows"})
            ways = [asdict(one) for one in made.ways]
            emit("product", **fields, used=product.way, tiles=tiles, gauge=_as_dict(gauge), ways=ways)
            return
        name = f"{product.dtype} {product.rows} x {product.depth} -> {product.columns}"
        for one in made.ways:
            far = "-" if one.error is None else f"{one.error:.1e}"
            note = one.trouble or ("" if one.engine else "for comparison")
            note = "used" if one.name == product.way else note
            shown = f"{one.name} {tiles}" if one.name == "fused" else one.name
            ms, rate = "-", "-"
            if one.ms is not None:
                ms, rate = f"{one.ms:.3f}", f"{made.operations / max(one.ms, 1e-6) / 1e9:.0f}"
            self._products.append((name, shown, ms, rate, far, note))
            name = ""
        self._gauge(f"{product.depth} -> {product.columns}", gauge)

    def _gauge(self, name: str, gauge: "Summary | None") -> None:
        if gauge is not None:
            held = f", held back by {', '.join(gauge.reasons)}" if gauge.reasons else ""
            self._gauges.append(
                f"{name}: {gauge.sm[0]:.0f} MHz ({gauge.memory[0]:.0f} MHz memory), {gauge.watts[0]:.0f} W, "
                f"{gauge.hottest} °C{held}"
            )

    def show(self) -> None:
        """On stdout."""
        if self.as_json:
            return
        if self._products:
            self._lines += [*_table(PRODUCTS, self._products, (2, 3, 4), self._width), ""]
        for line in [*self._lines, *self._gauges]:
            click.echo(line)


def _table(
    header: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[int, ...], width: int | None
) -> list[str]:
    first, *lines = aligned(header, rows, right=right, width=width)
    return [click.style(first, bold=True), *lines]


def _as_dict(gauge: "Summary | None") -> dict[str, Any] | None:
    return None if gauge is None else gauge.as_dict()
