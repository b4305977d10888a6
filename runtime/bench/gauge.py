"""The card while a part is measured: clocks, power, temperature, and what holds it back. No torch.

A thread asks the driver (NVML) several times a second. A card at its power limit lowers its clocks, so times
of two days compare only beside these numbers.
"""

import statistics
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

INTERVAL = 0.1  # seconds
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature",
    0x40: "hardware temperature",
    0x80: "power brake",
    0x100: "display clocks",
}
"""Bits of NVML's clock event (formerly throttle) reasons."""
HARMLESS = 0x1  # idle between two measurements


@dataclass(frozen=True)
class Reading:
    """The card at one moment: MHz, MHz, W, °C, and the reasons as a mask of bits."""

    sm: int
    memory: int
    watts: float
    celsius: int
    reasons: int


@dataclass(frozen=True)
class Summary:
    """Readings of one part: (median, least) of each, the hottest, and reasons -> share of the readings."""

    readings: int
    sm: tuple[float, float]
    memory: tuple[float, float]
    watts: tuple[float, float]
    celsius: tuple[float, float]
    hottest: int
    reasons: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarize(readings: list[Reading]) -> Summary | None:
    """What `readings` were like; None for none."""
    if not readings:
        return None

    def both(name: str) -> tuple[float, float]:
        values = [getattr(reading, name) for reading in readings]
        return float(statistics.median(values)), float(min(values))

    seen: Counter[str] = Counter()
    for reading in readings:
        for bit in (1 << place for place in range(reading.reasons.bit_length())):
            if reading.reasons & bit & ~HARMLESS:
                seen[REASONS.get(bit, f"reason {bit:#x}")] += 1
    return Summary(
        readings=len(readings),
        sm=both("sm"),
        memory=both("memory"),
        watts=both("watts"),
        celsius=both("celsius"),
        hottest=max(reading.celsius for reading in readings),
        reasons={name: round(times / len(readings), 3) for name, times in seen.most_common()},
    )


class Gauge:
    """Reads the card with this UUID while it is entered; `trouble` says why there is nothing to read.

    Use `during` around each part. Without a card (`uuid` None), driver or permission every summary is None.
    """

    def __init__(self, uuid: str | None, interval: float = INTERVAL) -> None:
        self.trouble = "" if uuid else "no card"
        self._uuid, self._interval = uuid, interval
        self._handle: Any = None
        self._nvml: Any = None
        self._readings: list[Reading] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._uuid is None:
            return self
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid.encode())
            self._read()
        # Not installed, no driver, no permission, a question that this card does not answer.
        except Exception as error:  # noqa: BLE001
            self.trouble = f"{type(error).__name__}: {error}"
            return self
        self._thread = threading.Thread(target=self._watch, name="gauge", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()

    @contextmanager
    def during(self) -> Iterator[list[Reading]]:
        """The readings of the block, which are whole when it ends; at least one at each end of it."""
        taken: list[Reading] = []
        self._ask()
        first = len(self._readings) - 1
        try:
            yield taken
        finally:
            self._ask()
            taken.extend(self._readings[max(first, 0) :])

    def _ask(self) -> None:
        if self._thread is not None and not self.trouble:
            self._take()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval) and not self.trouble:
            self._take()

    def _take(self) -> None:
        try:
            self._readings.append(self._read())
        except Exception as error:  # noqa: BLE001 - a card that stops answering ends no measurement
            self.trouble = f"{type(error).__name__}: {error}"

    def _read(self) -> Reading:
        nvml, handle = self._nvml, self._handle
        # Renamed in the driver's release 535; older bindings know only the first name.
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        return Reading(
            sm=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            memory=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            watts=nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            celsius=int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            reasons=int(reasons(handle)),
        )
