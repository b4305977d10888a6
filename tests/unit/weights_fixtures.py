"""Small files in the formats of weights, and manifests that name them; tests.hub publishes them."""

import io
import json
import random
import struct
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.profiles import load_manifest
from runtime.schema import ModelManifest, PublishedFile, Source
from runtime.weights import Patience

REPOSITORY = "tester/tiny"
HASTE = Patience(timeout=2, tries=3, pause=0.01, longest=0.3)


def safetensors(nbytes: int, seed: int = 0) -> bytes:
    """A file of one tensor of `nbytes` random bytes."""
    entry = {"a": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    header = json.dumps(entry).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(nbytes)


def pickle_zip(nbytes: int, seed: int = 0) -> bytes:
    """The outside of a .pth."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"nothing reads this")
        archive.writestr("archive/data/0", random.Random(seed).randbytes(nbytes))
    return file.getvalue()


def model() -> dict[str, bytes]:
    """A model of four files and what lies beside it in its repository."""
    return {
        "tiny_fp8/block_0.safetensors": safetensors(60_000, 1),
        "tiny_fp8/block_1.safetensors": safetensors(40_000, 2),
        "tiny_fp8/models_t5_umt5-xxl-enc-fp8.pth": pickle_zip(20_000, 3),
        "tiny_fp8/config.json": b'{"text_len": 512}',
    }


def manifest(paths: Iterable[str], name: str = "tiny", **changes: Any) -> ModelManifest:
    """A manifest that wants `paths` of REPOSITORY, or the PublishedFiles in `files`."""
    files = changes.pop("files", tuple(PublishedFile(path=path) for path in paths))
    source = Source(repository=REPOSITORY, revision=changes.pop("revision", None), files=files)
    update = {
        "name": name,
        "family": name,
        "source": source,
        "companions": (),
        "subdirectories": ("distill_fp8",),
    }
    return load_manifest("wan2.1-t2v-14b-4step-fp8").model_copy(update=update | changes)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a weights directory, except the notes."""
    found = [path for path in directory.rglob("*") if path.is_file()]
    named = {path.relative_to(directory).as_posix(): path for path in found}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(".t2v")}


def parts(directory: Path) -> dict[str, int]:
    """Sizes of what has arrived and is not in place."""
    found = {}
    for path in (directory / ".t2v").rglob("*.part"):
        with suppress(FileNotFoundError):  # it came to its place while this looks
            found[path.name.rsplit(".", 2)[0]] = path.stat().st_size
    return found
