"""Text states on disk: a prompt that was read once is known, and its text encoder need not come again.

A file of text states is a safetensors file. Tensor "text_states": (n, text_dim), one row for each real token,
in the dtype that they were computed in; the rows of zeros that follow them in the transformer are not stored.
Metadata, all strings: "format" ("t2v-text-states"), "prompt", "ids" (the n token ids, as JSON), "encoder"
(a digest of the encoder's files), "computed" (dtype, device and versions).

The cache holds such files under a digest of ids, encoder and way of computing. It is a convenience: whatever
is wrong with it (unwritable, full, damaged, another program's files) costs a note, never the video.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runtime import whole_file
from runtime.errors import OutputError, RequestError

FORMAT = "t2v-text-states"
CACHE_FOLDER = "text-states"
CACHE_LIMIT = 256 << 20
"""Bytes of all files in the cache; a prompt of 512 tokens takes 4 MiB, one of 50 about 400 KiB."""

OWN_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")

FLOATING = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class TextStates:
    """The states of one prompt, and of which prompt and which encoder they are."""

    rows: Tensor  # (n, text_dim), on the CPU
    ids: tuple[int, ...]  # n token ids, the end mark included
    prompt: str  # "" in the cache, which goes by ids
    encoder: str  # `encoder_digest`
    computed: str  # dtype, device and versions: equal words mean equal bits


def encoder_digest(fingerprints: Mapping[str, str] | Iterable[str]) -> str:
    """One digest of an encoder's files from their fingerprints (`runtime.provenance`), names left out."""
    values = fingerprints.values() if isinstance(fingerprints, Mapping) else fingerprints
    return hashlib.sha256("\n".join(sorted(values)).encode()).hexdigest()


def write_states(path: Path, states: TextStates) -> None:
    """Write a file of text states, replacing what is there; OSError if that cannot be done."""
    metadata = {
        "format": FORMAT,
        "prompt": states.prompt,
        "ids": json.dumps(states.ids),
        "encoder": states.encoder,
        "computed": states.computed,
    }
    content = save({"text_states": states.rows.cpu().contiguous()}, metadata)
    with whole_file.whole_file(path) as file:
        file.write(content)


def export_states(path: Path, states: TextStates) -> None:
    """`write_states` for a path that the user named; OutputError."""
    try:
        write_states(path, states)
    except OSError as error:
        raise OutputError(
            f"The text states could not be written to {path} ({error.strerror}); name another --text-states."
        ) from error


def read_states(path: Path) -> TextStates:
    """Read a file of `write_states`; RequestError if it is something else or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            rows = file.get_tensor("text_states") if "text_states" in names else None
    except (SafetensorError, OSError) as error:
        raise RequestError(
            f"{path} cannot be read as text states ({error}); expected a file that --text-states wrote."
        ) from error
    if metadata.get("format") != FORMAT or rows is None:
        raise RequestError(f"{path} holds no text states; expected a file that --text-states wrote.")
    ids = _ids(metadata.get("ids", ""))
    if ids is None or rows.ndim != 2 or len(rows) != len(ids) or rows.dtype not in FLOATING:
        raise RequestError(
            f"{path} holds text states of shape {tuple(rows.shape)} ({rows.dtype}) that do not belong to its "
            "token ids; it was changed: remove it, and --text-states writes it again."
        )
    if not bool(torch.isfinite(rows).all()):
        raise RequestError(
            f"The text states in {path} are not finite; remove it, and --text-states writes it again."
        )
    return TextStates(
        rows, ids, metadata.get("prompt", ""), metadata.get("encoder", ""), metadata.get("computed", "")
    )


def _ids(text: str) -> tuple[int, ...] | None:
    try:
        ids = json.loads(text)
    except ValueError:
        return None
    if not isinstance(ids, list) or not ids or not all(type(one) is int and one >= 0 for one in ids):
        return None
    return tuple(ids)


class TextCache:
    """Text states by token ids, for one encoder and one way of computing, in files below `directory`.

    `notes` are sentences for the user, gathered until somebody takes them.
    """

    def __init__(self, directory: Path, encoder: str, computed: str, limit: int = CACHE_LIMIT) -> None:
        self.directory = directory / CACHE_FOLDER
        self.encoder, self.computed, self.limit = encoder, computed, limit
        self.notes: list[str] = []
        self._told: set[str] = set()

    def path(self, ids: Iterable[int]) -> Path:
        """Where the states of these token ids are, or would be."""
        key = json.dumps([list(ids), self.encoder, self.computed])
        return self.directory / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def find(self, ids: Iterable[int], dim: int) -> Tensor | None:
        """The rows (n, dim) of these ids; None if they are not known, or their file is damaged."""
        ids = tuple(ids)
        path = self.path(ids)
        try:
            if not path.is_file():
                return None
            states = read_states(path)
        except (RequestError, OSError):
            self._note("damaged", f"{path} is damaged, so the prompt is read again.")
            return None
        of_these = (states.ids, states.encoder, states.computed) == (ids, self.encoder, self.computed)
        if not of_these or states.rows.shape[1] != dim:
            self._note("foreign", f"{path} holds other text states than its name says; it is written again.")
            return None
        try:
            os.utime(path)  # the oldest go first, so what is used stays young
        except OSError:  # a cache that may only be read is a good cache
            return states.rows
        return states.rows

    def keep(self, ids: Iterable[int], rows: Tensor) -> None:
        """Store `rows` (n, dim); the oldest files go if the cache grows too large."""
        ids = tuple(ids)
        path = self.path(ids)
        try:
            write_states(path, TextStates(rows, ids, "", self.encoder, self.computed))
            self._shrink(keep=path)
        except OSError as error:
            self._note(
                "unwritable",
                f"the text states are not kept for the next time: {self.directory} cannot be written "
                f"({error.strerror or error}); name another --cache, or none.",
            )

    def _shrink(self, keep: Path) -> None:
        found = []  # (time of last use, bytes, path)
        for path in self.directory.iterdir():
            if OWN_NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process is making room too
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size

    def _note(self, topic: str, sentence: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            self.notes.append(sentence)

    def take_notes(self) -> tuple[str, ...]:
        """The notes since the last call."""
        notes, self.notes = tuple(self.notes), []
        return notes
