"""The file of what was measured on a GPU: what may stand in it, reading it, writing it.

One JSON file, <cache>/tuning/<key>.json, for each kind of GPU, driver and set of versions; the key is a
digest of these, and the file repeats them in clear:

    {"format": "t2v-tuning", "schema": 1,
     "of": {"gpu": ..., "capability": "9.0", "driver": ..., "cuda": "12.8", "packages": {"torch": ..., ...}},
     "attention": [...], "products": [...], "avoided": [...]}

It is written beside its name and renamed, under a lock where the file system has locks.

No torch here.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime import whole_file
from runtime.device import Gpu, torch_cuda

SCHEMA = 1
FOLDER = "tuning"
LARGEST = 1 << 20
"""Bytes; a full file has some 50 KiB."""
MOST = 100
"""Entries of a kind; the oldest go first."""
LOCK_SECONDS = 1.0
"""Waited for another process that writes; then it is done without."""

PACKAGES = (
    *("fourstep", "torch", "triton", "sageattention", "nvidia-cudnn-frontend"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "flash-attn", "flash-attn-3"),
)
"""Whose versions decide what is right and what is fast; what is not installed is left out."""

Positive = Annotated[int, Field(gt=0, lt=1 << 31)]
Milliseconds = Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Word = Annotated[str, Field(max_length=100)]
Text = Annotated[str, Field(max_length=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Setting(_Strict):
    """What a measurement holds for."""

    gpu: Word
    capability: Word
    driver: Word
    cuda: Word
    packages: dict[Word, Word]

    @property
    def key(self) -> str:
        """The name of its file, without the ending."""
        text = json.dumps([SCHEMA, self.model_dump()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: "Setting") -> list[str]:
        """What has changed since `other`, as `torch 2.6.0 -> 2.8.0`."""
        pairs: dict[str, tuple[str, str]] = {
            "GPU": (other.gpu, self.gpu),
            "compute capability": (other.capability, self.capability),
            "driver": (other.driver, self.driver),
            "CUDA": (other.cuda, self.cuda),
        }
        for name in sorted({*self.packages, *other.packages}):
            pairs[name] = other.packages.get(name, "none"), self.packages.get(name, "none")
        return [f"{name} {before} -> {now}" for name, (before, now) in pairs.items() if before != now]


class Entry(_Strict):
    """One backend at one size: how far from fp32 and how long; ms is None where it was not timed."""

    name: Word
    ok: bool
    distance: Share | None = None
    ms: Milliseconds | None = None
    reason: Text = ""


class Attention(_Strict):
    """The backends at one size; `entries` fastest first. tokens, keys: those that were timed.

    heads: the model's; `t2v tune` times all of them, a run's own trial some (`backends.timed_heads`), in so
    much less time. won: what a run takes by this, if nothing speaks against it.
    """

    tokens: Positive
    keys: Positive
    heads: Positive
    head_dim: Positive
    dtype: Word
    date: Word
    won: Word
    entries: Annotated[tuple[Entry, ...], Field(max_length=50)]

    def same_size(self, other: "Attention") -> bool:
        """Whether this replaces the other."""
        names = ("tokens", "keys", "heads", "head_dim", "dtype")
        return all(getattr(self, name) == getattr(other, name) for name in names)


class Tiles(_Strict):
    """A config of `runtime.kernels.configs`."""

    rows: Positive
    columns: Positive
    depth: Positive
    group: Positive
    warps: Positive
    stages: Positive
    descriptors: bool
    programs: Positive


class Product(_Strict):
    """The 8-bit product with a weight (columns, depth), measured for `rows` tokens.

    way: of `runtime.linear`, the fastest. tiles: the best of the fused kernel, None where that does not run.
    ms: way -> milliseconds.
    """

    dtype: Word
    columns: Positive
    depth: Positive
    rows: Positive
    date: Word
    way: Word
    tiles: Tiles | None
    ms: dict[Word, Milliseconds]

    def same_size(self, other: "Product") -> bool:
        """Whether this replaces the other."""
        return (self.dtype, self.columns, self.depth) == (other.dtype, other.columns, other.depth)


class Avoided(_Strict):
    """A backend, or a way, whose numbers were wrong in a run on this GPU."""

    name: Word
    reason: Text
    date: Word


class Content(_Strict):
    """All of a file."""

    format: Literal["t2v-tuning"] = "t2v-tuning"
    version: Annotated[Literal[1], Field(alias="schema")] = 1
    of: Setting
    attention: Annotated[tuple[Attention, ...], Field(max_length=MOST)] = ()
    products: Annotated[tuple[Product, ...], Field(max_length=MOST)] = ()
    avoided: Annotated[tuple[Avoided, ...], Field(max_length=MOST)] = ()


def setting_of(gpu: Gpu) -> Setting:
    """A GPU as the driver describes it, and the versions that are installed."""
    built = torch_cuda()
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)[:100]
    return Setting(
        gpu=gpu.name[:100],
        capability=".".join(map(str, gpu.capability)),
        driver=gpu.driver[:100],
        cuda="none" if built is None else ".".join(map(str, built)),
        packages=packages,
    )


def today() -> str:
    """The date of a measurement, UTC."""
    return datetime.now(UTC).date().isoformat()


def load(path: Path) -> Content:
    """A file's content. OSError; ValueError where it is anything else than what this program writes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            text = file.read(LARGEST + 1)
    finally:
        os.close(descriptor)
    if len(text) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
    return Content.model_validate_json(text)


def why_not(error: ValueError) -> str:
    """In a few words, without what the file held."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return "it is cut off or no JSON"
    return f"its entry {'.'.join(map(str, first['loc']))[:60] or 'as a whole'} is not as expected"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One writer at a time, where the file system has locks; a lock ends with its process. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        until = time.monotonic() + LOCK_SECONDS
        while not _lock(descriptor) and time.monotonic() < until:
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # taken, or unknown to this file system: then the last one wins
        return False
    return True


def write(path: Path, content: Content) -> None:
    """Replace the file. OSError."""
    with whole_file.whole_file(path) as file:
        file.write(content.model_dump_json(indent=1, by_alias=True).encode())


def words(text: str, most: int = 1000) -> str:
    """One line of text that any file can hold, of so many characters."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:most]
