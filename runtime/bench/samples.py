"""What a measurement gives: repeated values and the rows they stand in. No torch."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Unit = Literal["s", "FLOP/s", "B/s", "ratio", ""]
"""Of a row's values; "" is a row of words alone."""


@dataclass(frozen=True)
class Sample:
    """The values of one thing that was measured several times, in the order of measuring; at least one."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a sample of no values")

    @property
    def median(self) -> float:
        """Half of the values are not above it, half not below."""
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def most(self) -> float:
        """The largest value."""
        return max(self.values)

    def map(self, of: Callable[[float], float]) -> "Sample":
        """Another sample, with `of` each value."""
        return Sample(tuple(of(value) for value in self.values))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the three numbers that are shown, and all values."""
        shown = {"median": self.median, "least": self.least, "most": self.most}
        return shown | {"values": list(self.values)}


def of_sum(samples: Mapping[str, Sample], times: Mapping[str, int]) -> Sample:
    """Round by round the sum of `times` each of `samples`, which were measured in the same rounds."""
    rounds = min(len(sample.values) for sample in samples.values())
    return Sample(
        tuple(
            sum(times[name] * sample.values[index] for name, sample in samples.items())
            for index in range(rounds)
        )
    )


@dataclass(frozen=True)
class Row:
    """One thing that was found.

    part: of the bench. what: in words, the same on every machine. found: None for a row of words alone, or
    for what could not be measured (`note` says why). reference: the same by the plain way, or the least that
    it could be. target: the name that `targets` knows it by. phase: its column where a part is one table of
    phases. right: of a check, whether it passed.
    """

    part: str
    what: str
    unit: Unit = ""
    found: Sample | None = None
    reference: Sample | None = None
    model: str = ""
    format: str = ""
    family: str = ""
    size: str = ""
    target: str = ""
    phase: str = ""
    note: str = ""
    right: bool | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the reference; None without one."""
        if self.found is None or self.reference is None or self.found.median <= 0:
            return None
        return self.reference.median / self.found.median

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is empty is left out."""
        fields = {name: value for name, value in asdict(self).items() if value not in ("", None)}
        for name in ("found", "reference"):
            sample = getattr(self, name)
            if sample is not None:
                fields[name] = sample.as_dict()
        return fields if self.ratio is None else fields | {"ratio": self.ratio}
