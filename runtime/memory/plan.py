"""Where everything lies during one video, what that takes and how long: decided before anything loads.

`make_plan` fills a budget: the ring first, then two slots, then the text's keys and values and as many
resident blocks as GPU memory leaves, then as many cached blocks as RAM leaves, and last the text encoder in
RAM if it was to stay on the GPU; the rest is read from disk each time. Pure arithmetic, no torch: `sizes`
knows the bytes of the model, `speeds` what a card does in a second, `costs` the formulas, `account` adds them
up and `choose` decides.

On the CPU (`Budget.vram` 0) the blocks compute where they lie: resident ones in RAM, the others come through
slots in RAM, and nothing is cached.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from runtime.errors import PlanError
from runtime.layers.tiles import Rung
from runtime.memory import remedies
from runtime.memory.account import (
    SLOTS,
    Budget,
    Choice,
    Device,
    Estimate,
    Inputs,
    Job,
    Parts,
    Ring,
    Text,
    Wish,
    device_parts,
    host_bytes,
    text_cache,
    times,
)
from runtime.memory.choose import DoesNotFitError, choose, exceeds, leaner, with_cache
from runtime.memory.sizes import ModelSizes
from runtime.memory.speeds import Speeds

__all__ = [
    *("Blocks", "Budget", "Choice", "Estimate", "Inputs", "Job", "Plan", "Ring", "Rung", "Wish"),
    *("assemble", "make_plan", "spread"),
]


@dataclass(frozen=True)
class Blocks:
    """Which blocks lie where; those that are neither resident nor cached are stored."""

    resident: tuple[int, ...]
    cached: tuple[int, ...]
    slots: int


@dataclass(frozen=True)
class Plan:
    """One way to make one video. Bytes and seconds are predictions.

    parts: phase -> what lies in the memory that computes (the GPU's, on the CPU the machine's) -> bytes.
    host: phase -> resident RAM of the process. disk_bytes: read for one video. reason: one line for people.
    """

    device: Device
    ring: Ring
    text: Text
    blocks: Blocks
    token_slice: int | None
    rung: Rung
    vae_stays: bool
    release_for_decode: bool
    text_kv: bool
    attention: str
    parts: Parts
    host: Mapping[str, int]
    disk_bytes: int
    seconds: Mapping[str, Estimate]
    reason: str
    inputs: Inputs = field(repr=False)

    @property
    def job(self) -> Job:
        """The video that it is for."""
        return self.inputs.job

    @property
    def budget(self) -> Budget:
        """What it had to fit."""
        return self.inputs.budget

    @property
    def peaks(self) -> dict[str, int]:
        """phase -> most bytes that torch will reserve on the GPU; all 0 on the CPU."""
        cuda = self.device == "cuda"
        return {phase: sum(parts.values()) if cuda else 0 for phase, parts in self.parts.items()}

    @property
    def vram(self) -> int:
        """The highest of `peaks`."""
        return max(self.peaks.values())

    @property
    def ram(self) -> int:
        """Most bytes of RAM that the process will have resident."""
        return max(self.host.values())

    @property
    def pinned(self) -> int:
        """Bytes of RAM that cannot be swapped, at most: of a text encoder in RAM, what the driver allows."""
        of_text = text_cache(self.inputs.sizes, self._choice())
        return self.ring.nbytes + of_text if self.ring.pinned else 0

    @property
    def total_seconds(self) -> float:
        """From the command to the mp4."""
        return sum(estimate.seconds for estimate in self.seconds.values())

    @property
    def text_slots(self) -> int:
        """Slots for the text encoder's blocks where they stream."""
        return min(SLOTS, self.inputs.sizes.text.count)

    def strip(self, width: int = 40) -> str:
        """The placement as a picture, first block first: # resident, + cached, . stored; at most `width`
        long.
        """
        where = dict.fromkeys(self.blocks.resident, "#") | dict.fromkeys(self.blocks.cached, "+")
        count = self.inputs.sizes.blocks.count
        shown = min(count, width)
        return "".join(where.get(i * count // shown, ".") for i in range(shown))

    def lower(self, phase: str) -> "Plan | None":
        """The next leaner plan after memory ran out in `phase`, None when there is none.

        Denoise: first what costs time alone. The text's keys and values leave, then what only stays for the
        next video, then half the resident blocks ... down to none; only then shorter slices of tokens and
        attention in 16 bits, at last one slot. Text and entry: the same without keys, slices and attention.
        Decode: the blocks leave, then what else stays, then smaller rungs. Each plan takes less in that phase
        than the one before, and no more in any other: what takes no less is passed over.
        """
        for choice in leaner(self.inputs, self._choice(), phase):
            lower = assemble(self.inputs, with_cache(self.inputs, choice))
            before, after = (
                {p: sum(parts.values()) for p, parts in plan.parts.items()} for plan in (self, lower)
            )
            if after.get(phase, 0) < before.get(phase, 0) and all(after[p] <= before[p] for p in before):
                return lower
        return None

    def _choice(self) -> Choice:
        blocks = self.blocks
        return Choice(
            ring=self.ring,
            text=self.text,
            resident=len(blocks.resident),
            cached=len(blocks.cached),
            slots=blocks.slots,
            token_slice=self.token_slice,
            rung=self.rung,
            vae_stays=self.vae_stays,
            release=self.release_for_decode,
            text_kv=self.text_kv,
            attention=self.attention,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the model's sizes and the speeds themselves."""
        return {
            "device": self.device,
            "job": asdict(self.job),
            "budget": asdict(self.budget),
            "placement": {
                "blocks": self.inputs.sizes.blocks.count,
                "resident": list(self.blocks.resident),
                "cached": list(self.blocks.cached),
                "slots": self.blocks.slots,
                "text": self.text,
                "token_slice": self.token_slice,
                "rung": self.rung.name,
                "vae_stays": self.vae_stays,
                "release_for_decode": self.release_for_decode,
                "text_kv": self.text_kv,
                "attention": self.attention or "16 bits",
                "ring": asdict(self.ring),
            },
            "predicted": {
                "vram": self.peaks,
                "parts": {phase: dict(parts) for phase, parts in self.parts.items()},
                "ram": dict(self.host),
                "pinned": self.pinned,
                "disk_bytes": self.disk_bytes,
                "seconds": {phase: round(e.seconds, 3) for phase, e in self.seconds.items()},
                "limits": {phase: e.limit for phase, e in self.seconds.items()},
                "total_seconds": round(self.total_seconds, 3),
                "speeds": {
                    "measured": self.inputs.speeds.measured,
                    "disk_measured": self.inputs.speeds.disk_known,
                    "source": self.inputs.speeds.source,
                },
            },
            "reason": self.reason,
        }


def make_plan(sizes: ModelSizes, job: Job, budget: Budget, speeds: Speeds, wish: Wish | None = None) -> Plan:
    """The fastest placement that fits `budget`.

    Raises PlanError: one sentence that says what is short, and the cheapest changes that would fit.
    """
    inputs, wish = Inputs(sizes, job, budget, speeds), wish or Wish()
    try:
        return assemble(inputs, choose(inputs, wish))
    except DoesNotFitError as fault:
        raise PlanError(remedies.sentence(inputs, fault, wish.alternatives)) from None


def assemble(inputs: Inputs, choice: Choice) -> Plan:
    """The plan that follows from `choice`, whether or not it fits."""
    parts = device_parts(inputs, choice)
    count = inputs.sizes.blocks.count
    resident = spread(range(count), choice.resident)
    cached = spread([i for i in range(count) if i not in resident], choice.cached)
    disk, seconds = times(inputs, choice)
    return Plan(
        device=inputs.device,
        ring=choice.ring,
        text=choice.text,
        blocks=Blocks(resident, cached, choice.slots),
        token_slice=choice.token_slice,
        rung=choice.rung,
        vae_stays=choice.vae_stays,
        release_for_decode=choice.release,
        text_kv=choice.text_kv,
        attention=choice.attention,
        parts=parts,
        host=host_bytes(inputs, choice, parts),
        disk_bytes=disk,
        seconds=seconds,
        reason=_reason(inputs, choice),
        inputs=inputs,
    )


def spread(places: range | list[int], count: int) -> tuple[int, ...]:
    """`count` of `places`, evenly: each in the middle of its share."""
    total = len(places)
    return tuple(places[(2 * i + 1) * total // (2 * count)] for i in range(count))


def _reason(inputs: Inputs, choice: Choice) -> str:
    """One line: what was chosen, and what it went by."""
    count = inputs.sizes.blocks.count
    stored = count - choice.resident - choice.cached
    memory, what = (
        (inputs.budget.ram, "RAM") if inputs.device == "cpu" else (inputs.budget.vram, "GPU memory")
    )
    there = f"{memory / 2**30:.1f} GiB of {what}"
    if not choice.slots:
        return f"{there} hold all {count} blocks beside the activations: nothing streams"
    where = f"{there} hold {choice.resident or 'none'} of {count} blocks beside the activations"
    ways = [f"{choice.cached} stream from RAM"] if choice.cached else []
    ways += [f"{stored} from disk"] if stored else []
    text = f"{where}; {' and '.join(ways) if choice.cached else f'{stored} stream from disk'}"
    tight = exceeds(inputs, replace(choice, cached=choice.cached + 1)) if stored else None
    return f"{text}, as RAM holds no more" if tight is not None and tight.what == "ram" else text
