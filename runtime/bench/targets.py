"""What was set as a goal, for which card, and whether a measurement reached it. No torch.

A goal is for one card: elsewhere there is none, and the ratios to the reference and to the machine's own
ceilings are what can be compared.
"""

from dataclasses import dataclass

from runtime.bench.samples import Row

FULL = "wan2.1-t2v-14b-4step"
SMALL_SIZE, LARGE_SIZE = "480x832x81", "720x1280x81"


@dataclass(frozen=True)
class Target:
    """At most so much (seconds, or a ratio) for a row of that name, size and format; None: any."""

    row: str
    most: float
    size: str | None = None
    formats: tuple[str, ...] | None = None
    card: str = "H200"
    family: str = FULL


TARGETS = (
    Target("forward", 1.85, SMALL_SIZE, ("fp8", "int8")),
    Target("forward", 7.5, LARGE_SIZE, ("fp8",)),
    Target("forward other", 0.130, SMALL_SIZE, ("fp8", "int8")),
    Target("decode", 0.95, SMALL_SIZE),
    Target("decode", 2.3, LARGE_SIZE),
    Target("decode first", 2.0),
    Target("text", 0.030),
    Target("text streamed", 1.2),
    Target("run", 8.5, SMALL_SIZE, ("fp8",)),
    Target("run other", 0.6, SMALL_SIZE, ("fp8",)),
    Target("cold run", 20.0, SMALL_SIZE, ("fp8",)),
)


@dataclass(frozen=True)
class Verdict:
    """Of a row that has a goal somewhere: `most` of it on this card, None where none was set for it."""

    most: float | None
    reached: bool | None

    def as_dict(self) -> dict[str, float | bool | None]:
        """For JSON."""
        return {"most": self.most, "reached": self.reached}


def judge(row: Row, card: str) -> Verdict | None:
    """Whether a row reached its goal on the card of this name; None for a row that has none anywhere."""
    meant = [
        target
        for target in TARGETS
        if row.found is not None
        and target.row == row.target
        and target.family == row.family
        and target.size in (None, row.size)
        and (target.formats is None or row.format in target.formats)
    ]
    here = next((target for target in meant if target.card.lower() in card.lower()), None)
    if here is None or row.found is None:
        return Verdict(None, None) if meant else None
    return Verdict(here.most, row.found.median <= here.most)
