"""How far `t2v tune` is, and how long it takes yet: a bar on a terminal, a line now and then, or events."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import click

from entrypoint.events import emit
from entrypoint.table import duration

LINE_SECONDS = 5.0
JSON_SECONDS = 1.0


class Progress:
    """Parts with the seconds that each is expected to take; shows itself not more often than `pause`.

    A context manager, so that a live display ends before anything else is printed.
    """

    pause = LINE_SECONDS

    def __init__(self, parts: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._parts, self._clock = dict(parts), clock
        self._began = self._told = clock()
        self._done: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def ticker(self, part: str) -> Callable[[float], None]:
        """What a part tells its share to."""

        def tick(share: float) -> None:
            self._done[part] = min(max(share, 0.0), 1.0)
            now = self._clock()
            if now - self._told >= self.pause:
                self._told = now
                self._show(part)

        return tick

    def end(self, part: str) -> None:
        """A part is whole."""
        self._done[part] = 1.0
        self._told = self._clock()
        self._show(part)

    @property
    def share(self) -> float:
        """Of all parts, 0 to 1."""
        whole = sum(self._parts.values())
        return sum(self._parts[name] * share for name, share in self._done.items()) / whole

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began

    @property
    def left(self) -> float | None:
        """Seconds, at the pace so far; None before there is one."""
        return self.seconds * (1 - self.share) / self.share if self.share > 0 else None

    def _show(self, part: str) -> None:
        left = "" if self.left is None or self.share >= 1 else f", about {duration(self.left)} left"
        click.echo(f"{part} {self.share:.0%}, {duration(self.seconds)}{left}", err=True)


class JsonProgress(Progress):
    """Events, as the head of `entrypoint.tune` describes them."""

    pause = JSON_SECONDS

    def _show(self, part: str) -> None:
        left = None if self.left is None else round(self.left, 3)
        emit("progress", part=part, done=round(self.share, 4), seconds=round(self.seconds, 3), eta=left)


class LiveProgress(Progress):
    """One bar."""

    pause = 0.1

    def __init__(self, parts: Mapping[str, float]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        super().__init__(parts)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[left]}"),
        )
        self._bars: Any = Bars(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bars.add_task(next(iter(parts)), total=1.0, left="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _show(self, part: str) -> None:
        left = "" if self.left is None else f"about {duration(self.left)} left"
        self._bars.update(self._task, description=part, completed=self.share, left=left)


def make_progress(parts: Mapping[str, float], *, as_json: bool) -> Progress:
    """The one that suits where stderr goes."""
    if as_json:
        return JsonProgress(parts)
    return LiveProgress(parts) if sys.stderr.isatty() else Progress(parts)
