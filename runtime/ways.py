"""Which way computes on this device, and the safer ones below it.

    ways = choose_ways(device, tokens, text_len, heads, head_dim, dtype, attention="auto")
    ways.use_in(transformer)
    with ways.computing():
        ...
    ways.lower(fault)         one rung down: what it is now, in words, or None where there is none

A way is an attention backend for tokens among each other, one for tokens and text, and the fused kernels or
their twins in plain torch. The ladder goes from attention to attention while that is to blame or computes in
8 bits, then to plain kernels, then to the formula itself (`sdpa-math`); docs/guard.md.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any, Protocol

import torch

from runtime.errors import RequestError
from runtime.guard import Fault
from runtime.kernels.launch import trouble, twins
from runtime.layers.attending import Attending
from runtime.layers.backends import (
    BACKENDS,
    LAST_RESORT,
    Choice,
    check_name,
    choose,
    named,
    rungs,
)
from runtime.memory.plan import Plan
from runtime.memory.visit import give_back
from runtime.samples import AttentionSample, KernelSample
from runtime.transformer import Transformer
from runtime.tuning import FUSED_KERNELS

FUSED, PLAIN = "fused", "plain"


class Memory(Protocol):
    """What gave wrong numbers on this GPU before; kept by whoever can (`runtime/tuning.py`)."""

    def avoided(self) -> set[str]:
        """Names of attention backends, and FUSED_KERNELS."""

    def avoid(self, name: str, reason: str) -> None:
        """From now on."""

    def take_notes(self) -> tuple[str, ...]:
        """What the user should read of it, once."""


Chooser = Callable[..., Choice]
"""(device, tokens, keys=, heads=, head_dim=, dtype=, forced=), as `backends.choose`."""


class NoMemory:
    """A `Memory` of nothing."""

    def avoided(self) -> set[str]:
        """Nothing."""
        return set()

    def avoid(self, name: str, reason: str) -> None:
        """Forgotten at once."""

    def take_notes(self) -> tuple[str, ...]:
        """None."""
        return ()


class Ways:
    """The way in use on one device.

    Attributes:
        name, on_text: backends in use, of tokens among each other and on the text. kernels: FUSED or PLAIN.
        fell_back: what went wrong and what came instead, since the beginning, for the records.
        sampled, kernel_samples: what the guard reads.
    """

    def __init__(
        self,
        device: torch.device | str,
        ladder: Sequence[str] = ("sdpa", LAST_RESORT),
        on_text: str = "sdpa",
        *,
        fused: bool = False,
        memory: Memory | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """`ladder`: attention backends from the one to begin with; fused: whether the kernels run here."""
        self.device = torch.device(device)
        self._ladder = list(ladder)
        self.on_text = on_text
        self.kernels = FUSED if fused else PLAIN
        self._memory = NoMemory() if memory is None else memory
        self._notes = list(notes)
        self._left: list[tuple[str, Fault]] = []  # since the last result that was right
        self.fell_back: list[str] = []
        self.sampled = AttentionSample(Attending(self.name, self.device), self.bits)
        self.kernel_samples: KernelSample | None = None

    @property
    def name(self) -> str:
        """The attention backend of tokens among each other."""
        return self._ladder[0]

    @property
    def bits(self) -> int:
        """8, 16 or 32: the precision of that backend."""
        return BACKENDS[self.name].bits

    @property
    def eight_bits(self) -> str:
        """The attention backend where it computes in 8 bits: a plan must have room for its copies."""
        return self.name if self.bits == 8 else ""

    def keep_to(self, plan: Plan | None) -> bool:
        """Leave 8 bits where the plan of a GPU has no room for their copies; whether anything changed."""
        if plan is None or plan.device != "cuda" or plan.attention or self.bits != 8:
            return False
        before = self.name
        while self.bits == 8:
            self._ladder.pop(0)
        self._notes.append(f"there is no room for the copies of attention {before}: {self.name} computes it.")
        return True

    def use_in(self, transformer: Transformer) -> None:
        """Have all blocks compute this way, with samples taken."""
        if self.kernel_samples is not None:
            self.kernel_samples.close()
        fused = self.kernels == FUSED
        self.sampled = AttentionSample(Attending(self.name, self.device), self.bits, len(transformer.blocks))
        self.kernel_samples = KernelSample(transformer, self.sampled) if fused else None
        transformer.use_attention(self.sampled, Attending(self.on_text, self.device))

    def begin(self, step: int) -> None:
        """A denoise step begins: samples are taken anew."""
        self.sampled.begin(step)
        if self.kernel_samples is not None:
            self.kernel_samples.begin(step)

    def computing(self) -> AbstractContextManager[None]:
        """Inside, kernels run this way."""
        return twins() if self.kernels == PLAIN else nullcontext()

    def lower(self, fault: Fault, where: str) -> str | None:
        """Go one rung down because of `fault` in `where` ("denoise step 2"); None if there is none.

        An attention that is to blame, or that computes in 8 bits while nothing else is, gives way to the
        next; else the kernels do, and then the formula computes all attention.
        """
        before = str(self)
        if len(self._ladder) > 1 and (
            fault.origin == "attention" or (self.bits == 8 and fault.origin != "kernels")
        ):
            self._left.append((self._ladder.pop(0), fault))
        elif self.kernels == FUSED:
            self.kernels = PLAIN
            self._left.append((FUSED_KERNELS, fault))
        elif self.name != LAST_RESORT or self.on_text != LAST_RESORT:
            self._left.append((self.name, fault))
            self._ladder, self.on_text = [LAST_RESORT], LAST_RESORT
        else:
            return None
        self._tell(before, fault, where)
        return str(self)

    def lower_kernels(self, fault: Fault, where: str) -> str | None:
        """As `lower`, for what knows no attention: from fused kernels to plain ones."""
        if self.kernels == PLAIN:
            return None
        before, self.kernels = str(self), PLAIN
        self._left.append((FUSED_KERNELS, fault))
        self._tell(before, fault, where)
        return str(self)

    def worked(self) -> None:
        """A result was right: what was left for it is remembered for this GPU.

        Attention that the sampled rows have shown wrong, and of the rest what was left last: if the rungs
        between were wrong too, it was not by themselves.
        """
        for number, (name, fault) in enumerate(self._left, start=1):
            if (fault.origin or number == len(self._left)) and name != LAST_RESORT:
                self._memory.avoid(name, fault.reason)
        self._left = []

    def take_notes(self) -> tuple[str, ...]:
        """What the user should read, once; of the memory too."""
        notes, self._notes = (*self._notes, *self._memory.take_notes()), []
        return notes

    def as_dict(self) -> dict[str, str]:
        """For the record."""
        return {"attention": self.name, "text_attention": self.on_text, "kernels": self.kernels}

    def __str__(self) -> str:
        """In words."""
        return f"attention {self.name} with {self.kernels} kernels"

    def _tell(self, before: str, fault: Fault, where: str) -> None:
        self.fell_back.append(f"{where}: {before} -> {self}: {fault}")
        self._notes.append(f"{where} went wrong with {before} ({fault}); repeated with {self}.")


# --------------------------------------------------------------------------------------------------- choosing


def choose_ways(
    device: torch.device | str,
    tokens: int,
    text_len: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    attention: str = "auto",
    before: Mapping[str, Any] | None = None,
    memory: Memory | None = None,
    *,
    chooser: Chooser | None = None,
) -> Ways:
    """The fastest way that is right here, and its ladder; on a CPU torch's attention, with nothing tried.

    attention: a backend to begin with, or "auto". before: the record of a run whose way is to be taken where
    it works here, so that the pixels are the same. What `memory` avoids is taken only where it is asked for
    by name. chooser: `backends.choose`, or what knows its answers.
    Raises RequestError for a backend that is unknown or does not work here.
    """
    check_name(attention)
    place = torch.device(device)
    memory = NoMemory() if memory is None else memory
    avoided = memory.avoided()
    notes: list[str] = []
    chooser = partial(choose, avoided=avoided) if chooser is None else chooser
    asked = partial(chooser, place, tokens, heads=heads, head_dim=head_dim, dtype=dtype)
    same = _ways_of(before, place)
    choice = _as_before(same, asked, notes, place)
    if choice is None:
        choice = _first(asked, attention, place)
    ladder = [name for name in rungs(choice, place) if name == choice.name or name not in avoided]
    if LAST_RESORT not in ladder:
        ladder.append(LAST_RESORT)
    if attention in avoided:
        notes.append(f"attention {attention} gave wrong numbers on this GPU before.")
    fused = place.type == "cuda" and trouble(place) is None
    if fused and FUSED_KERNELS in avoided:
        notes.append("the fused kernels gave wrong numbers on this GPU before: plain ones run, slower.")
        fused = False
    fused = fused and same.get("kernels") != PLAIN
    on_text = _on_text(asked, text_len, place, same)
    if place.type == "cuda":
        give_back(str(place))  # what the trials took
    return Ways(place, ladder, on_text, fused=fused, memory=memory, notes=notes)


def _first(asked: Chooser, attention: str, device: torch.device) -> Choice:
    if attention != "auto":
        return asked(forced=attention)
    if device.type == "cpu":  # there is nothing to choose between, and no reason to try it
        return Choice("sdpa", named("sdpa", device), ())
    return asked()


def _as_before(
    same: Mapping[str, str], asked: Chooser, notes: list[str], device: torch.device
) -> Choice | None:
    name = same.get("attention")
    if name is None or (device.type == "cpu" and name == "sdpa"):  # which comes anyway
        return None
    try:
        return asked(forced=name)
    except RequestError as error:
        notes.append(f"{error} The run before had it, so pixels may differ.")
        return None


def _on_text(asked: Chooser, text_len: int, device: torch.device, same: Mapping[str, str]) -> str:
    name = same.get("text_attention")
    if device.type == "cpu":
        return LAST_RESORT if name == LAST_RESORT else "sdpa"
    if name is not None:
        with suppress(RequestError):  # told of the other attention already, where it is the same
            return asked(forced=name).name
    return asked(keys=text_len).name


def _ways_of(record: Mapping[str, Any] | None, device: torch.device) -> Mapping[str, str]:
    """The way of a record, if it was made on such a device; the record may come from anyone."""
    if record is None or str(record.get("device", "")).partition(":")[0] != device.type:
        return {}
    ways = record.get("ways")
    if not isinstance(ways, dict):
        return {}
    return {name: value for name, value in ways.items() if isinstance(value, str)}
