"""`t2v tune`: measure what is fastest on this GPU for a model, and remember it for every run.

With --json, stdout has one object a line:

    {"event": "progress",  "part": str, "done": float, "seconds": float, "eta": float|null}       done: 0 to 1
    {"event": "attention", "tokens": int, "keys": int, "heads": int, "head_dim": int, "dtype": str,
                           "used": str, "gauge": {...}|null,
                           "backends": [{"name": str, "bits": int, "ok": bool, "distance": float|null,
                                         "ms": float|null, "reason": str}]}
    {"event": "product",   "dtype": str, "columns": int, "depth": int, "rows": int, "used": str,
                           "tiles": str|null, "gauge": {...}|null,
                           "ways": [{"name": str, "ms": float|null, "error": float|null, "trouble": str}]}
    {"event": "note",      "message": str}
    {"event": "result",    "path": str|null, "seconds": float}            path: of what is remembered

gauge: the card meanwhile (runtime.bench.gauge.Summary): clocks in MHz, power in W.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entrypoint.cache import choose_cache
from entrypoint.events import emit, tell, tell_warning
from entrypoint.options import (
    MODEL,
    SIZE,
    SectionedCommand,
    cache_option,
    model_options,
    option,
    talk_options,
)
from entrypoint.table import duration
from runtime.errors import DeviceError, RequestError

if TYPE_CHECKING:
    import torch

    from runtime.bench.gauge import Gauge, Summary
    from runtime.device import Gpu
    from runtime.layers.backends import Proof
    from runtime.tuner import Multiplied
    from runtime.tuning import Store
    from runtime.tuning_file import Attention

PROVING, ATTENTION, CROSS, PRODUCT = 12.0, 6.0, 2.0, 20.0
"""Seconds of each part on an H200: what the time left goes by until it is known better."""


@click.command(cls=SectionedCommand)
@model_options()
@option(SIZE, "--size", "HxWxF", "Of the video: 480x832x81.", default_text="the model's usual one")
@option(MODEL, "--forget", None, "Also try again what gave wrong numbers before.")
@cache_option
@talk_options
def tune(
    model: str | None,
    weights: Path | None,
    profile: str,
    device: str,
    size: str | None,
    forget: bool,
    cache: str | None,
    json: bool,
    debug: bool,
) -> None:
    """Measure what is fastest on this GPU, and remember it.

    Every attention at the model's number of tokens, and the tiles of its 8-bit products; no weights are
    needed. Runs take what is remembered until driver, torch or another version changes.
    """
    from runtime.tuning import open_store

    began = time.perf_counter()
    pixels = _pixels(size)
    chosen, gpu, place = _card(device, profile)
    subject = _subject(model, weights, chosen, place, pixels, cache)
    store = open_store(choose_cache(cache), place)
    if forget:
        store.forgive()
    _measure(subject, store, gpu, place, as_json=json)
    notes = store.take_notes()
    for note in notes:
        _note(note, as_json=json)
    path = store.path if store.path is not None and store.path.is_file() else None
    seconds = time.perf_counter() - began
    if json:
        emit("result", path=None if path is None else str(path.absolute()), seconds=round(seconds, 3))
    else:
        kept = "nothing is kept" if path is None else f"remembered in {path}"
        tell(f"{kept}; {duration(seconds)}")


def _card(device: str, profile: str) -> "tuple[str, Gpu, str]":
    """The profile's name, the GPU and `cuda:N`. DeviceError where it would be a CPU."""
    from runtime.device import gpu_of, inventory, select_device
    from runtime.profiles import load_profile

    _, place = select_device(device, load_profile(profile))
    gpu = gpu_of(place)
    if gpu is None:
        why = inventory().reason or "torch cannot use the one that is here: t2v doctor says why"
        if "cpu" in (device, profile):
            why = "a CPU was asked for, where there is nothing to choose: leave --device and --profile out"
        raise DeviceError(f"t2v tune measures a GPU, and has none: {why}.")
    return profile, gpu, place


# ----------------------------------------------------------------------------------------- what to measure


@dataclass(frozen=True)
class Subject:
    """A model as it will run: the name, its sizes, and how many tokens go through its matrices at a time.

    form: "fp8", "int8", or another, whose products torch computes. matrices: (columns, depth) of them.
    """

    name: str
    tokens: int
    text_len: int
    heads: int
    head_dim: int
    dtype: str
    form: str
    matrices: tuple[tuple[int, int], ...]
    token_slice: int

    def __str__(self) -> str:
        """For people."""
        slices = f", slices of {self.token_slice}" if self.token_slice < self.tokens else ""
        return f"{self.name}: {self.tokens} tokens{slices}, {self.heads} heads of {self.head_dim}"


Pixels = tuple[int | None, int | None, int | None]


def _subject(
    model: str | None, weights: Path | None, profile: str, place: str, pixels: Pixels, cache: str | None
) -> Subject:
    """By the plan of such a run, from headers or the manifest."""
    from entrypoint.plan import make

    height, width, frames = pixels
    planned, about = make(
        model=model,
        weights=weights,
        profile=profile,
        device=place,
        vram=None,
        ram=None,
        cache=cache,
        height=height,
        width=width,
        frames=frames,
    )
    sizes, tokens = planned.inputs.sizes, planned.inputs.job.video.tokens
    dim, ffn = sizes.dim, sizes.ffn_dim
    return Subject(
        name=about.manifest.name,
        tokens=tokens,
        text_len=sizes.text_len,
        heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        dtype=about.profile.dtype,
        form=sizes.quantization,
        matrices=tuple(dict.fromkeys(((dim, dim), (ffn, dim), (dim, ffn)))) if sizes.quantized else (),
        token_slice=min(planned.token_slice or tokens, tokens),
    )


def _pixels(size: str | None) -> Pixels:
    """`480x832x81` -> (480, 832, 81); RequestError."""
    if size is None:
        return None, None, None
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})x([0-9]{1,5})", size.strip().lower())
    if match is None:
        raise RequestError(f"--size is {size!r}; expected height, width and frames, as in 480x832x81.")
    return int(match[1]), int(match[2]), int(match[3])


# --------------------------------------------------------------------------------------------- measuring


def _measure(subject: Subject, store: "Store", gpu: "Gpu", place: str, *, as_json: bool) -> None:
    """All parts, each kept as soon as it is known; then the tables."""
    from entrypoint.tune_page import Page
    from entrypoint.tune_progress import make_progress
    from runtime.bench.gauge import Gauge

    parts = {"proofs": PROVING, "self attention": ATTENTION, "cross attention": CROSS}
    for columns, depth in subject.matrices:
        parts[f"product {depth} -> {columns}"] = PRODUCT
    page = Page(subject, store.avoided(), as_json=as_json)
    if not as_json:
        tell(f"{subject} on {gpu.name}")
    with make_progress(parts, as_json=as_json) as progress, Gauge(gpu.uuid) as gauge:
        trials = _trials(place)
        progress.end("proofs")
        torch_device = _start(place)
        proofs = _proofs(trials, subject, torch_device)
        fits = subject.tokens
        for name, keys in (("self attention", subject.tokens), ("cross attention", subject.text_len)):
            found, summary = _attention(subject, keys, torch_device, proofs, gauge, progress.ticker(name))
            store.keep_attention(found)
            page.attention(name, found, summary)
            fits = min(fits, found.tokens)
            progress.end(name)
        for columns, depth in subject.matrices:
            name = f"product {depth} -> {columns}"
            right = [way for way, works in trials["ways"].get(subject.form, {}).items() if works]
            made, summary = _product(
                subject, (columns, depth), torch_device, right, gauge, progress.ticker(name)
            )
            store.keep_product(made.product)
            page.product(made, summary)
            progress.end(name)
    page.show()
    for sentence in _remarks(subject, fits, torch_device):
        _note(sentence, as_json=as_json)


def _trials(place: str) -> dict[str, Any]:
    """What is right here, found in a process of its own. DeviceError where nothing runs."""
    from entrypoint.trial_runs import run_trials

    trials = run_trials(place)
    if "error" in trials:
        raise DeviceError(
            f"torch cannot compute on {place} ({trials['error']}); t2v doctor says what is wrong."
        )
    return trials


def _start(place: str) -> "torch.device":
    """Torch on the device."""
    from runtime.device import confirm_device
    from runtime.memory import allocator

    allocator.settle()
    confirm_device(place)
    import torch

    return torch.device(place)


def _proofs(trials: dict[str, Any], subject: Subject, device: "torch.device") -> "list[Proof]":
    """Those of the trials; anew for another dtype or width of a head, but for what ended its process."""
    from runtime.layers.backends import Proof, prove
    from runtime.loading import DTYPES

    found = []
    for one in trials.get("attention", []):
        distance = float("nan") if one["distance"] is None else one["distance"]
        proof = Proof(one["name"], one["ok"], distance, one["reason"])
        crashed = "ended the" in one["reason"]
        if not crashed and (subject.dtype, subject.head_dim) != ("bf16", 128):
            proof = prove(one["name"], device, DTYPES[subject.dtype], subject.head_dim)
        found.append(proof)
    return found


def _attention(
    subject: Subject,
    keys: int,
    device: "torch.device",
    proofs: "list[Proof]",
    gauge: "Gauge",
    tick: Any,
) -> "tuple[Attention, Summary | None]":
    from runtime.bench.gauge import summarize
    from runtime.loading import DTYPES
    from runtime.tuner import Size, attention, free_bytes

    size = Size(subject.tokens, keys, subject.heads, subject.head_dim)
    size = size.within(int(0.9 * free_bytes(device)))
    with gauge.during() as readings:
        found = attention(device, size, DTYPES[subject.dtype], proofs, tick)
    return found, summarize(readings)


def _product(
    subject: Subject,
    shape: tuple[int, int],
    device: "torch.device",
    right: list[str],
    gauge: "Gauge",
    tick: Any,
) -> "tuple[Multiplied, Summary | None]":
    from runtime.bench.gauge import summarize
    from runtime.tuner import product

    with gauge.during() as readings:
        found = product(device, subject.form, *shape, subject.token_slice, right, tick)
    return found, summarize(readings)


def _remarks(subject: Subject, fits: int, device: "torch.device") -> list[str]:
    """What the tables do not say."""
    said = []
    reason = _reason_against_kernels(device)
    if subject.matrices and reason is not None:
        said.append(f"our kernels cannot run here ({reason}), so torch's products were measured alone.")
    if not subject.matrices:
        said.append(f"{subject.name} is {subject.form}: its products are torch's, with no tiles to choose.")
    if fits < subject.tokens:
        said.append(f"{subject.tokens} tokens do not fit in the memory that is free: {fits} were measured.")
    return said


def _reason_against_kernels(device: "torch.device") -> str | None:
    from runtime.kernels.launch import trouble

    return trouble(device) if device.type == "cuda" else None


def _note(sentence: str, *, as_json: bool) -> None:
    tell_warning(sentence)
    if as_json:
        emit("note", message=sentence)
