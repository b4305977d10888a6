"""What a download has to do: each wanted file against what the hub lists and what is there already."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import WeightsError
from runtime.schema import ModelManifest
from runtime.weights.hub import Hub, Listing, Published
from runtime.weights.state import NOTES, Pinned, Record, WantedFile, pinned_of, read_record, size_of
from runtime.weights.verify import git_id_of

State = Literal["have", "check", "link", "part", "need", "none"]
"""have: verified before. check: there, from elsewhere. link: another model's file is the same one.
part: begun. need: all of it has to come. none: optional, and not published."""


@dataclass
class Item:
    """One wanted file, what the hub says of it (None: not asked), and what is there of it."""

    file: WantedFile
    state: State
    bytes: int  # in all; about, where the hub was not asked
    arrived: int = 0  # of it, in a part
    listing: Listing | None = None
    published: Published | None = None
    twin: Path | None = None

    @property
    def missing(self) -> int:
        """Bytes that have yet to come."""
        return self.bytes - self.arrived if self.state in ("need", "part") else 0


@dataclass
class Plan:
    """All files of a model; `exact` once the hub has told sizes. `free`: bytes on the disk."""

    model: str
    directory: Path
    items: list[Item]
    free: int
    exact: bool

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(item.bytes for item in self.items)

    @property
    def missing(self) -> int:
        """Bytes that have yet to come; all that they need on the disk, for parts are moved and not copied."""
        return sum(item.missing for item in self.items)

    def check_space(self) -> None:
        """WeightsError if what is missing does not fit on the disk."""
        rounding = 0 if self.exact else self.missing // 50  # sizes of three digits must not refuse what fits
        if self.missing - rounding > self.free:
            about = "" if self.exact else "about "
            lacking = decimal(self.missing - self.free)
            raise WeightsError(
                f"{self.model} needs {about}{decimal(self.missing)} more in {self.directory}, temporary "
                f"files included, and {decimal(self.free)} are free there; make room for {lacking}, or name "
                "a directory on another disk with --weights."
            )


class Planner:
    """Plans for one model in one directory. Raises WeightsError for what contradicts; changes nothing."""

    def __init__(
        self, manifest: ModelManifest, directory: Path, record: Record, revision: str | None, hub: Hub
    ) -> None:
        self.manifest = manifest
        self.directory = directory
        self.record = record
        self.revision = revision  # of the transformer's repository; None: as noted, or the newest
        self.hub = hub
        self.incoming = directory / NOTES / "incoming" / manifest.name

    def rough(self, files: list[WantedFile]) -> Plan:
        """From the manifest and the notes alone, without a hub."""
        return Plan(
            self.manifest.name, self.directory, [self._rough_item(file) for file in files], self.free(), False
        )

    def exact(self, files: list[WantedFile]) -> Plan:
        """From what the hub lists; WeightsError where that contradicts manifest, notes or files."""
        listings = {}
        for file in files:
            if file.repository not in listings:
                listings[file.repository] = self.hub.listing(file.repository, self._revision_of(file))
        twins = self._twins()
        items = [self._item(file, listings[file.repository], twins) for file in files]
        return Plan(self.manifest.name, self.directory, items, self.free(), True)

    def free(self) -> int:
        """Bytes that may be written where the directory is, or will be."""
        return free_bytes(self.directory)

    def pinned(self, file: WantedFile) -> Pinned | None:
        """The note that `file` must agree with; none where another revision was asked for."""
        return None if self.revision is not None and file.primary else pinned_of(file, self.record)

    def part(self, file: WantedFile, published: Published) -> Path:
        """Where `file` arrives: named by its content, so that no part of other content is continued."""
        return self.incoming / f"{file.target}.{published.key}.part"

    def foreign(self, file: WantedFile, why: str) -> WeightsError:
        """The error for a file in place that is neither ours nor the published one."""
        return WeightsError(
            f"{self.directory / file.target} is not the published {file.path} ({why}) and was not downloaded "
            "here, so it is not replaced; move it away and run this again."
        )

    def _rough_item(self, file: WantedFile) -> Item:
        pinned = pinned_of(file, self.record)
        there = size_of(self.directory / file.target)
        nbytes = pinned.bytes if pinned is not None else file.about_bytes
        damaged = file.target in self.record.damaged
        if there is not None and (pinned is None or (there == nbytes and not damaged)):
            return Item(file, "check" if pinned is None else "have", there)
        target = self.incoming / file.target
        parts = target.parent.glob(f"{target.name}.*.part") if target.parent.is_dir() else ()
        begun = sum(size_of(part) or 0 for part in parts)
        return Item(file, "part" if begun else "need", nbytes, min(begun, nbytes))

    def _revision_of(self, file: WantedFile) -> str | None:
        asked = self.revision if file.primary else None
        return asked or file.revision or self.record.commit_of(file.repository)

    def _item(self, file: WantedFile, listing: Listing, twins: dict[str, Path]) -> Item:
        published = listing.files.get(file.path)
        if published is None:
            if file.optional:
                return Item(file, "none", 0, listing=listing)
            raise WeightsError(
                f"{file.repository} has no file {file.path} at revision {listing.commit[:12]}; name another "
                "with --revision, or pull another model of `t2v models`."
            )
        self._agree(file, published)
        target = self.directory / file.target
        there = size_of(target)
        noted = pinned_of(file, self.record)
        if there is not None and noted is None:
            if there != published.bytes:
                raise self.foreign(file, f"it is {there} bytes long, not {published.bytes}")
            return Item(file, "check", there, listing=listing, published=published)
        sound = noted is not None and file.target not in self.record.damaged
        if sound and noted is not None and there == published.bytes and _same(noted, published, target):
            return Item(file, "have", there, listing=listing, published=published)
        twin = twins.get(published.sha256 or "")
        if twin is not None and twin != target and size_of(twin) == published.bytes:
            return Item(file, "link", published.bytes, listing=listing, published=published, twin=twin)
        part = size_of(self.part(file, published)) or 0
        arrived = part if part <= published.bytes else 0
        state: State = "part" if arrived else "need"
        return Item(file, state, published.bytes, arrived, listing, published)

    def _agree(self, file: WantedFile, published: Published) -> None:
        """The hub's file must be the one that manifest and notes know."""
        pinned = self.pinned(file)
        self._compare(
            *(file, published, file.sha256, file.bytes, "the manifest"),
            "a mirror may be wrong (HF_ENDPOINT), or this program too old",
        )
        if pinned is not None:
            self._compare(
                *(file, published, pinned.sha256, pinned.bytes, f"{NOTES}/{self.manifest.name}.json"),
                "if you trust what it has now, name its revision: --revision main",
            )

    def _compare(
        self,
        file: WantedFile,
        published: Published,
        digest: str | None,
        nbytes: int | None,
        by: str,
        advice: str,
    ) -> None:
        found, expected = f"{published.bytes} bytes", f"{nbytes} bytes"
        if nbytes is None or published.bytes == nbytes:
            found, expected = f"sha256 {published.sha256}", f"sha256 {digest}"
            if digest is None or published.sha256 in (None, digest):
                return
        raise WeightsError(
            f"{file.repository} has another {file.path} now, {found}, than {by} says, {expected}; nothing "
            f"was downloaded: {advice}."
        )

    def _twins(self) -> dict[str, Path]:
        """Verified files of all models in this directory, by digest."""
        twins = {}
        for notes in sorted((self.directory / NOTES).glob("*.json")):
            record = read_record(self.directory, notes.stem)
            for target in record.files.keys() - set(record.damaged):
                twins[record.files[target].sha256] = self.directory / target
        return twins


def _same(noted: Pinned, published: Published, target: Path) -> bool:
    if published.sha256 is not None:
        return published.sha256 == noted.sha256
    return (
        published.git_id is None or git_id_of(target) == published.git_id
    )  # small: git keeps no large files


def free_bytes(directory: Path) -> int:
    """Bytes that a user may write where `directory` is, or will be."""
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def decimal(nbytes: float) -> str:
    """Bytes as the pages of publishers count them, in powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"
