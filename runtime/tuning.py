"""What was measured on a GPU before: which attention is fastest, which tiles, what gave wrong numbers.

    store = open_store(cache, "cuda:0")
    choice = choose_attention(store, device, tokens=32760)       known: one proof; else timed, and kept
    apply_tiles(store, device)                                   the 8-bit products, as `t2v tune` found them

The file (`tuning_file`) is a convenience: one of other versions, a damaged, foreign, unreadable or read-only
one costs a note, never the video. Changes are made to what it holds at that moment, so processes side by side
lose nothing.

No torch at module level.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.device import gpu_of
from runtime.tuning_file import (
    FOLDER,
    MOST,
    Attention,
    Avoided,
    Content,
    Entry,
    Product,
    Setting,
    load,
    locked,
    setting_of,
    today,
    why_not,
    words,
    write,
)

if TYPE_CHECKING:
    import torch

    from runtime.kernels.tune import Timing
    from runtime.layers.backends import Choice, Proof

OTHERS = 64
"""Files of the folder that are looked at for the reason why this one is missing."""

Change = Callable[[Content], dict[str, Any]]


def open_store(cache: Path | None, device: str) -> "Store":
    """The store for `device` ("cpu", "cuda:N") in a cache directory; None: for this process alone."""
    gpu = gpu_of(device) if device != "cpu" else None
    return Store(None) if gpu is None else Store(cache, setting_of(gpu))


@dataclass
class Store:
    """What is known of one kind of GPU. `notes` are sentences for the user, until somebody takes them.

    directory: the cache; None keeps everything in this process.
    """

    directory: Path | None
    setting: Setting = field(
        default_factory=lambda: Setting(gpu="none", capability="0.0", driver="none", cuda="none", packages={})
    )
    notes: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set, init=False)
    _content: Content | None = field(default=None, init=False)
    _unwritten: list[Change] = field(default_factory=list, init=False)

    @property
    def path(self) -> Path | None:
        """The file, whether or not it is there."""
        return None if self.directory is None else self.directory / FOLDER / f"{self.setting.key}.json"

    @property
    def content(self) -> Content:
        """What is known, read once."""
        if self._content is None:
            self._content = self._read() or Content(of=self.setting)
        return self._content

    # --- what is known ---

    def attention(self, tokens: int, keys: int, heads: int, head_dim: int, dtype: str) -> Attention | None:
        """The backends as they were timed at this size, or at the nearest that stands for it."""
        found = [
            one
            for one in self.content.attention
            if (one.heads, one.head_dim, one.dtype) == (heads, head_dim, dtype)
            and _stands_for(one.tokens, tokens)
            and _stands_for(one.keys, keys)
        ]
        return min(found, key=lambda one: abs(one.tokens - tokens) + abs(one.keys - keys), default=None)

    def avoided(self) -> set[str]:
        """Names of what gave wrong numbers on this GPU before."""
        return {one.name for one in self.content.avoided}

    # --- what is learned ---

    def keep_attention(self, found: Attention) -> None:
        """Keep the backends of one size, in the place of what was known of it."""
        self._change(lambda now: {"attention": _with(now.attention, found, found.same_size)})

    def keep_product(self, found: Product) -> None:
        """Keep how one product is multiplied, in the place of what was known of it."""
        self._change(lambda now: {"products": _with(now.products, found, found.same_size)})

    def avoid(self, name: str, reason: str) -> None:
        """From now on, `name` is left out on this GPU with these versions."""
        new = Avoided(name=words(name, 100), reason=words(reason), date=today())
        self._change(lambda now: {"avoided": _with(now.avoided, new, lambda one: one.name == new.name)})

    def forgive(self) -> None:
        """Nothing is left out any longer."""
        self._change(lambda now: {"avoided": ()})

    def take_notes(self) -> tuple[str, ...]:
        """The notes since the last call."""
        notes = tuple(self.notes)
        self.notes.clear()
        return notes

    # --- the file ---

    def _change(self, change: Change) -> None:
        """Apply a change to what is known now, by whomever, and write it."""
        path = self.path
        if path is None:
            self._content = _changed(self.content, [change])
            return
        self._unwritten.append(change)
        try:
            with locked(path):
                # Another process may have written since; a file that is no good is replaced.
                self._content = _changed(self._read() or self.content, self._unwritten)
                write(path, self._content)
                self._unwritten.clear()
        except OSError as error:
            self._content = _changed(self.content, self._unwritten)
            self.note(
                f"what was measured on this GPU is not kept for the next time: {path.parent} cannot be "
                f"written ({error.strerror or error}); name another --cache, or none.",
                topic="unwritable",
            )

    def _read(self) -> Content | None:
        """The file, if it is whole and of this setting; else a word why not, if there was anything."""
        path = self.path
        if path is None:
            return None
        try:
            found = load(path)
        except FileNotFoundError:
            self._say_why_new(path.parent)
            return None
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else why_not(error)
            self.note(f"{path} is no good ({what}), so this GPU is measured again.", topic="damaged")
            return None
        if found.of != self.setting:
            self.note(f"{path} is of another GPU or other versions; it is measured again.", topic="foreign")
            return None
        return found

    def _say_why_new(self, folder: Path) -> None:
        """Measured before with other versions: then the time that it takes again has a reason."""
        newest: tuple[float, list[str]] | None = None
        with contextlib.suppress(OSError):
            for path in sorted(folder.glob("*.json"))[:OTHERS]:
                with contextlib.suppress(OSError, ValueError):
                    other, when = load(path).of, path.stat().st_mtime
                    if other.gpu == self.setting.gpu and (newest is None or when > newest[0]):
                        newest = when, self.setting.differences(other)
        if newest is not None:
            changed = ", ".join(newest[1][:3])
            self.note(
                f"this GPU was measured before with other versions ({changed}); it is again.", topic="stale"
            )

    def note(self, sentence: str, topic: str = "") -> None:
        """Tell the user once."""
        if (topic or sentence) not in self._told:
            self._told.add(topic or sentence)
            self.notes.append(sentence)


def _changed(content: Content, changes: Iterable[Change]) -> Content:
    for change in changes:
        content = content.model_copy(update=change(content))
    return content


_T = TypeVar("_T")


def _with(known: tuple[_T, ...], new: _T, replaces: Callable[[_T], bool]) -> tuple[_T, ...]:
    return (*(one for one in known if not replaces(one)), new)[-MOST:]


# ---------------------------------------------------------------------------------------------- using it

LONG = 30720
"""Tokens from which on one length stands for another (runtime.layers.backends.TIMED_TOKENS)."""


def _stands_for(timed: int, wanted: int) -> bool:
    return timed == wanted or min(timed, wanted) >= LONG


def choose_attention(
    store: Store,
    device: "torch.device",
    tokens: int,
    keys: int | None = None,
    heads: int = 40,
    head_dim: int = 128,
    dtype: "torch.dtype | None" = None,
    forced: str | None = None,
) -> "Choice":
    """`backends.choose`, from memory where that is possible. dtype: bf16 unless given.

    What the store knows is proven again here, the fastest alone; what it does not know, or what does not
    hold any longer, is timed and kept. What it says to avoid is left out, unless it is `forced`.
    Raises RequestError for a forced backend that is unknown or does not work here.
    """
    import torch

    from runtime.layers import backends

    dtype = dtype or torch.bfloat16
    keys = tokens if keys is None else keys
    avoided = store.avoided()
    if forced not in (None, "auto") or device.type != "cuda":
        return backends.choose(device, tokens, keys, heads, head_dim, dtype, forced, avoided=avoided)
    known = store.attention(tokens, keys, heads, head_dim, _named(dtype))
    if known is not None:
        choice = _remembered(known, store, device, dtype)
        if choice is not None:
            return choice
    choice = backends.choose(device, tokens, keys, heads, head_dim, dtype, avoided=avoided)
    if choice.timings:
        size = (min(tokens, LONG), min(keys, LONG), heads, head_dim, _named(dtype))
        store.keep_attention(_learned(choice, store, size))
    return choice


def _named(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _remembered(
    known: Attention, store: Store, device: "torch.device", dtype: "torch.dtype"
) -> "Choice | None":
    """The fastest of what is known, proven here; None where something was not timed, or does not hold."""
    from runtime.kernels.tune import Timing
    from runtime.layers import backends

    entries = {one.name: one for one in known.entries if one.name in backends.BACKENDS}
    proofs = backends.without([_proof(one) for one in entries.values()], store.avoided())
    names = backends.admitted(proofs, (), known.tokens, known.keys)
    timed = [entries[name] for name in names if entries[name].ms is not None]
    if not timed or any(entries[name].ms is None and not entries[name].reason for name in names):
        return None
    best = min(timed, key=lambda one: one.ms or 0.0)
    proof = backends.prove(best.name, device, dtype, known.head_dim)
    run = backends.available(best.name, device)
    if not proof.ok or run is None:
        store.note(
            f"attention {best.name} was right on this GPU and is not any more ({proof.reason}): all are "
            "measured again."
        )
        return None
    timings = sorted((Timing(one.name, one.ms) for one in timed), key=lambda one: one.milliseconds or 0.0)
    checked = tuple(proof if one.name == best.name else one for one in proofs)
    return backends.Choice(best.name, run, checked, tuple(timings))


def _proof(entry: Entry) -> "Proof":
    from runtime.layers.backends import Proof

    distance = float("nan") if entry.distance is None else entry.distance
    return Proof(entry.name, entry.ok, distance, "" if entry.ok else entry.reason)


def _learned(choice: "Choice", store: Store, size: tuple[int, int, int, int, str]) -> Attention:
    """What a choice has shown of this size, beside what was known of backends that it did not time."""
    new = entries_of(choice.proofs, choice.timings)
    older = store.attention(*size)
    same = older is not None and (older.tokens, older.keys) == size[:2]
    before = {one.name: one for one in older.entries} if older is not None and same else {}
    avoided = store.avoided()
    merged = {
        **before,  # of a backend that was left out now the time stays true
        **{
            one.name: one
            for one in new
            if one.name not in avoided and (one.ms is not None or not one.ok or one.name not in before)
        },
    }
    tokens, keys, heads, head_dim, dtype = size
    entries = fastest_first(merged.values())
    return Attention(
        tokens=tokens,
        keys=keys,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        date=today(),
        won=winner(entries, tokens, keys),
        entries=entries,
    )


def entries_of(proofs: "Iterable[Proof]", timings: "Iterable[Timing]") -> list[Entry]:
    """Proofs and timings of the same backends, joined by name."""
    times = {one.name: one for one in timings}
    made = []
    for proof in proofs:
        timing = times.get(proof.name)
        reason = proof.reason or ("" if timing is None else timing.trouble)
        made.append(
            Entry(
                name=proof.name,
                ok=proof.ok,
                distance=proof.distance if math.isfinite(proof.distance) else None,
                ms=None if timing is None else timing.milliseconds,
                reason=words(reason),
            )
        )
    return made


def fastest_first(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Those with a time by their time, then those that are right, then the rest."""
    return tuple(sorted(entries, key=lambda one: (one.ms is None, one.ms or 0.0, not one.ok)))


def winner(entries: Iterable[Entry], tokens: int, keys: int, avoided: Collection[str] = ()) -> str:
    """The backend that a run takes by these entries."""
    from runtime.layers import backends

    entries = [one for one in entries if one.name in backends.BACKENDS]
    names = backends.admitted([_proof(one) for one in entries], avoided, tokens, keys)
    timed = [one for one in entries if one.name in names and one.ms is not None]
    return min(timed, key=lambda one: one.ms or 0.0).name if timed else backends.LAST_RESORT


FUSED_KERNELS = "fused-kernels"
"""The kernels around attention and products, by the name under which they are avoided, beside those of
attention backends; avoided, they are not tuned either."""

USABLE = {"fp8": "fused"}
"""format -> the way that layers of it take where it was measured to be the fastest. For int8 that is the
usual way; torch's own needs memory for its sums that a plan with fused kernels has not."""


def apply_tiles(store: Store, device: "torch.device") -> int:
    """Have the 8-bit products run as they were measured to be fastest; how many there are.

    A config that is no candidate for this GPU is left out: the file may be anyone's.
    """
    if device.type != "cuda" or not store.content.products:
        return 0
    import torch

    from runtime.kernels import configs, launch
    from runtime.linear.module import prefer
    from runtime.linear.quantize import FORMATS

    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    applied = 0
    for one in store.content.products:
        if one.dtype not in FORMATS:
            continue
        dtype = FORMATS[one.dtype].dtype
        place = (device, dtype, one.columns, one.depth)
        known = configs.candidates(launch.capability(device), dtype, launch.HAS_DESCRIPTORS)
        config = None if one.tiles is None else configs.Config(**one.tiles.model_dump())
        if config in known and FUSED_KERNELS not in store.avoided():
            configs.use(config, *place)
            prefer(one.way if one.way == USABLE.get(one.dtype) else None, *place)
            applied += 1
    return applied
