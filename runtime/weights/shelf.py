"""Which models lie in a weights directory: present, partial or absent, and where."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.schema import ModelManifest
from runtime.weights.state import NOTES, WantedFile, pinned_of, read_record, size_of, wanted_files


@dataclass(frozen=True)
class Shelved:
    """One model: bytes that are there of `total` (about, where no size is known yet), and where."""

    model: str
    state: Literal["present", "partial", "absent"]
    bytes: int
    total: int
    where: Path
    verified: bool  # every file was verified when it came
    missing: tuple[str, ...]


def shelf(manifests: Sequence[ModelManifest], directory: Path) -> list[Shelved]:
    """Look for every model in `directory`, by names and sizes alone; embedded ones are always there."""
    owners = Counter(file.target for manifest in manifests for file in wanted_files(manifest))
    return [_shelved(manifest, directory, owners) for manifest in manifests]


def _shelved(manifest: ModelManifest, directory: Path, owners: Counter[str]) -> Shelved:
    embedded = manifest.embedded_directory()
    if embedded is not None:
        places = [embedded / name for name in manifest.subdirectories]
        size = sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())
        return Shelved(manifest.name, "present", size, size, embedded, True, ())
    record = read_record(directory, manifest.name)
    files = wanted_files(manifest)
    pinned = {file.target: pinned_of(file, record) for file in files}

    def expected(file: WantedFile) -> int | None:
        noted = pinned[file.target]
        return file.bytes if noted is None else noted.bytes

    there = {file.target: size_of(directory / file.target) for file in files}
    whole = {
        f.target for f in files if there[f.target] is not None and expected(f) in (None, there[f.target])
    }
    missing = tuple(f.target for f in files if f.target not in whole and not f.optional)
    # A tokenizer that several models share makes none of them partial.
    own = any(
        there[target] is not None and (owners[target] == 1 or pinned[target] is not None) for target in there
    )
    begun = [p for p in (directory / NOTES / "incoming" / manifest.name).rglob("*.part") if p.is_file()]
    state: Literal["present", "partial", "absent"] = "partial" if own or begun else "absent"
    return Shelved(
        manifest.name,
        "present" if not missing else state,
        sum(size or 0 for size in there.values()),
        sum(expected(file) or file.about_bytes or there[file.target] or 0 for file in files),
        directory,
        not missing and all(pinned[file.target] is not None for file in files if not file.optional),
        missing,
    )
