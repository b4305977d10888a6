"""Download a model: plan, check the space, fetch in parallel, verify, move into place, note.

A file gets its name in the weights directory only after its size, its digest and its header were proven, by a
rename; from then on it is read-only. Whatever interrupts a download, the bytes that have arrived stay in
DIR/.t2v/incoming, and the same command continues there.
"""

import errno
import os
import shutil
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import RequestError, WeightsError
from runtime.schema import ModelManifest
from runtime.weights.hub import Hub, Patience, Published, Stopped, UnreachableError
from runtime.weights.plan import Item, Plan, Planner, decimal, free_bytes
from runtime.weights.progress import Meter, Progress
from runtime.weights.state import (
    NOTES,
    Pinned,
    Record,
    WantedFile,
    is_complete,
    locked,
    read_record,
    wanted_files,
    write_record,
)
from runtime.weights.verify import check_header, git_id_of, sha256_of

WORKERS = 4
REPORT_SECONDS = 0.25
_FULL = (errno.ENOSPC, errno.EDQUOT)


class PullReporter:
    """What a download speaks to, from the thread that called `pull`; this one says nothing."""

    def notice(self, message: str) -> None:
        """A sentence for people."""

    def plan(self, plan: Plan) -> None:
        """What will be downloaded; nothing has been yet."""

    def progress(self, progress: Progress) -> None:
        """How far the download is, several times a second."""


@dataclass
class Pulled:
    """What `pull` left: `bytes` of `files` in place, of which `received` came over the network just now.

    complete_before: everything was there and verified, so nothing was asked.
    """

    model: str
    directory: Path
    files: int
    bytes: int
    received: int = 0
    complete_before: bool = False


def pull(
    manifest: ModelManifest,
    directory: Path,
    reporter: PullReporter | None = None,
    *,
    revision: str | None = None,
    workers: int = WORKERS,
    dry_run: bool = False,
    patience: Patience | None = None,
) -> Pulled:
    """Make `directory` hold every file of `manifest`, verified; nothing is asked where that is so already.

    revision: of the transformer's repository; None is the manifest's, then that of the files noted in
    `directory`, then the newest. Naming one replaces files that it has otherwise. dry_run: the plan goes to
    the reporter, and that is all. Raises WeightsError with what to do, RequestError for an unpublished model.
    """
    reporter = reporter or PullReporter()
    embedded = manifest.embedded_directory()
    if embedded is not None:
        return Pulled(manifest.name, embedded, 0, 0, complete_before=True)
    files = wanted_files(manifest)
    if not files:
        raise RequestError(f"{manifest.name} names no files; expected source.files in its manifest.")
    stop = threading.Event()
    job = _Job(manifest, directory, reporter, revision, Hub(patience, stop), stop)
    if dry_run:
        return job.pretend(files)
    if revision is None and (done := job.done_before(files)):
        return done
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory, manifest.name, reporter.notice):
            if revision is None and (done := job.done_before(files)):  # another process may have been faster
                return done
            return job.run(files, workers)
    except OSError as error:
        raise _disk_fault(error, directory) from error


@dataclass
class _Job:
    """One download; its notes are written after each file, by one thread at a time."""

    manifest: ModelManifest
    directory: Path
    reporter: PullReporter
    revision: str | None
    hub: Hub
    stop: threading.Event
    guard: threading.Lock = field(default_factory=threading.Lock)

    def done_before(self, files: list[WantedFile]) -> Pulled | None:
        record = read_record(self.directory, self.manifest.name)
        complete = is_complete(files, record, self.directory)
        return self._pulled(record, 0, complete_before=True) if complete else None

    def _pulled(self, record: Record, received: int, *, complete_before: bool) -> Pulled:
        total = sum(pinned.bytes for pinned in record.files.values())
        return Pulled(self.manifest.name, self.directory, len(record.files), total, received, complete_before)

    def _planner(self) -> Planner:
        record = read_record(self.directory, self.manifest.name)
        return Planner(self.manifest, self.directory, record, self.revision, self.hub)

    def pretend(self, files: list[WantedFile]) -> Pulled:
        """The plan only; without a hub a rough one."""
        planner = self._planner()
        try:
            plan = planner.exact(files)
        except UnreachableError as error:
            self.reporter.notice(f"sizes are approximate: {error}")
            plan = planner.rough(files)
        self.reporter.plan(plan)
        plan.check_space()
        return Pulled(self.manifest.name, self.directory, len(files), plan.total)

    def run(self, files: list[WantedFile], workers: int) -> Pulled:
        """All of it, with the lock held."""
        planner = self._planner()
        planner.rough(files).check_space()  # before the network: it takes no hub to see that a disk is full
        plan = planner.exact(files)
        self._tidy(plan, planner)
        plan.free = planner.free()
        self.reporter.plan(plan)
        plan.check_space()
        todo = [item for item in plan.items if item.state not in ("have", "none")]
        meter = Meter(plan.missing, len(todo))
        self._all(todo, planner, meter, workers)
        record = planner.record
        targets = {item.file.target for item in plan.items}
        record.files = {name: pinned for name, pinned in record.files.items() if name in targets}
        record.absent = [item.file.target for item in plan.items if item.state == "none"]
        write_record(self.directory, record)
        shutil.rmtree(planner.incoming, ignore_errors=True)
        return self._pulled(record, meter.received, complete_before=False)

    def _tidy(self, plan: Plan, planner: Planner) -> None:
        """Remove parts that no file of the plan continues, so that they do not take up the space."""
        kept = {planner.part(item.file, item.published) for item in plan.items if item.published is not None}
        for part in planner.incoming.rglob("*.part") if planner.incoming.is_dir() else ():
            if part not in kept:
                part.unlink()

    def _all(self, todo: list[Item], planner: Planner, meter: Meter, workers: int) -> None:
        """Every file that is not there, several at a time; the first fault stops the others and is raised."""
        with ThreadPoolExecutor(max(1, workers)) as pool:
            futures: list[Future[None]] = [pool.submit(self._one, item, planner, meter) for item in todo]
            try:
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, timeout=REPORT_SECONDS, return_when=FIRST_EXCEPTION)
                    self.reporter.progress(meter.progress())
                    if any(future.exception() is not None for future in done):
                        break
            finally:
                self.stop.set()  # on Ctrl-C too: what is running ends at its next bytes
                pool.shutdown(wait=True, cancel_futures=True)
        faults = [future.exception() for future in futures if not future.cancelled()]
        for fault in sorted((f for f in faults if f is not None), key=lambda f: isinstance(f, Stopped)):
            raise fault

    def _one(self, item: Item, planner: Planner, meter: Meter) -> None:
        assert item.listing is not None
        assert item.published is not None
        file, target = item.file, self.directory / item.file.target
        if item.state == "check":
            digest = self._adopt(planner, item.published, file, target)
        else:
            part = planner.part(file, item.published)
            part.parent.mkdir(parents=True, exist_ok=True)
            if item.twin is None or not self._link(item.twin, item.published, part):
                self.hub.fetch(item.listing, file.path, part, meter.add)
            digest = self._prove(planner, item.published, file, part)
            _settle(part, target)
        pinned = Pinned(
            bytes=item.published.bytes,
            sha256=digest,
            repository=file.repository,
            commit=item.listing.commit,
        )
        with self.guard:
            planner.record.files[file.target] = pinned
            planner.record.damaged = [name for name in planner.record.damaged if name != file.target]
            write_record(self.directory, planner.record)
        meter.file_done()

    def _link(self, twin: Path, published: Published, part: Path) -> bool:
        """Let `part` be another name of `twin`; False where that is damaged or names cannot be shared."""
        if self._digest(twin) != published.sha256:
            return False
        part.unlink(missing_ok=True)
        try:
            part.hardlink_to(twin)
        except OSError:  # a file system without hard links: then it is downloaded
            return False
        return True

    def _prove(self, planner: Planner, published: Published, file: WantedFile, part: Path) -> str:
        """The digest of a finished part; a part that is not the published file is removed."""
        digest = self._digest(part)
        try:
            self._compare(planner, published, file, part, digest)
            check_header(part, file.target)
        except WeightsError as error:
            part.unlink()
            raise WeightsError(
                f"{file.path} of {file.repository} arrived broken: {_about(error, part)}. It was removed and "
                "nothing was put into place; run the same command again, over another network or without a "
                "mirror if it happens twice."
            ) from error
        return digest

    def _adopt(self, planner: Planner, published: Published, file: WantedFile, target: Path) -> str:
        """The digest of a file that was there before us, if it is the published one."""
        digest = self._digest(target)
        try:
            self._compare(planner, published, file, target, digest)
        except WeightsError as error:
            raise planner.foreign(file, _about(error, target)) from error
        return digest

    def _digest(self, path: Path) -> str:
        digest = sha256_of(path, stop=self.stop)
        if self.stop.is_set():
            raise Stopped
        return digest

    def _compare(
        self, planner: Planner, published: Published, file: WantedFile, path: Path, digest: str
    ) -> None:
        pinned = planner.pinned(file)
        for expected in (published.sha256, file.sha256, pinned.sha256 if pinned is not None else None):
            if expected is not None and digest != expected:
                raise WeightsError(f"{path} has sha256 {digest}, expected {expected}")
        if published.sha256 is None and published.git_id is not None:
            found = git_id_of(path)
            if found != published.git_id:
                raise WeightsError(f"{path} has git id {found}, expected {published.git_id}")


def _settle(part: Path, target: Path) -> None:
    """Give a proven part its name: on the disk first, read-only, then renamed over whatever was there."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.chmod(0o444)
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)


def _about(error: WeightsError, path: Path) -> str:
    """What an error says of `path`, without naming it and without its own advice."""
    return str(error).removeprefix(str(path)).lstrip(": ").split("; download")[0]


def _disk_fault(error: OSError, directory: Path) -> WeightsError:
    if error.errno in _FULL:
        free = decimal(free_bytes(directory))
        return WeightsError(
            f"The disk of {directory} is full ({free} free); make room and run the same command again: it "
            "continues where it stopped."
        )
    if error.errno == errno.EXDEV:
        return WeightsError(
            f"{error.filename2 or directory} is on another file system than {directory / NOTES}, where "
            "downloads arrive; name the directory itself with --weights instead of a link to it."
        )
    return WeightsError(
        f"{error.filename or directory} cannot be written ({error.strerror or error}); mount it writable, or "
        "name another directory with --weights."
    )
