"""The run file: a video in the making, on disk beside its output, so that whatever happens it can go on.

`NAME.run.safetensors` lies beside NAME.mp4 while the run works and goes when the video is there. It is
written before anything loads, after the text states and after each denoise step before the next begins, whole
or not at all.

Tensors, as far as the run has come: "text_states" (n, text_dim) and "negative_states" (m, text_dim) in the
dtype that they were computed in, until the last step; "latents" (16, T, h, w) fp32; "generator_state" uint8.
Metadata, all strings: "format" ("t2v-run"); that of kept latents, so that `t2v decode` reads it; "run", JSON:

    version       1
    model, weights, profile, device, cache, vram, ram, attention, profile_changes
                  as asked for, paths absolute; without attention: auto
    output        the video's path; "beside": whether the run file lies in its directory
    overwrite, contact_sheet, save_latents
    record        what the mp4 would say: the request, files with fingerprints, versions, dtypes

The process that works on a run holds a lock (flock) on its file, which ends with the process.
"""

import fcntl
import json
import os
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint.events import Reporter
from entrypoint.latents import latents_metadata
from runtime.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.resume import ResumePoint

FORMAT = "t2v-run"
VERSION = 1
RUN_SUFFIX = ".run.safetensors"

TEXTS = ("model", "profile", "device", "output", "attention")
OPTIONAL_TEXTS = ("weights", "cache")
ABSENT = {"attention": "auto"}  # what an older file means, which lacks it
FLAGS = ("overwrite", "contact_sheet", "save_latents", "beside")
CEILINGS = ("vram", "ram")
TABLES = ("profile_changes", "record")


@dataclass(frozen=True)
class Job:
    """What was asked for, with all that another process needs to do it; the JSON of a run file."""

    model: str
    weights: str | None
    profile: str
    device: str
    cache: str | None
    vram: float | None
    ram: float | None
    attention: str
    profile_changes: dict[str, Any]
    output: str
    beside: bool
    overwrite: bool
    contact_sheet: bool
    save_latents: bool
    record: dict[str, Any]

    @property
    def steps(self) -> int:
        """Denoise steps in all."""
        return int(self.record["steps"])


@dataclass(frozen=True)
class SavedRun:
    """A run file as it was read."""

    job: Job
    point: "ResumePoint | None"  # None: nothing is computed yet


class RunFile:
    """The run file of the run that this process works on.

    A place that cannot be written is told once and costs the run nothing: the temporary directory takes its
    place, and if that fails too, `path` is None. `reporter` hears of that, and of each new place.
    """

    def __init__(self, job: Job, reporter: Reporter) -> None:
        self.job = job
        self.reporter = reporter
        self.path: Path | None = None
        self.point: ResumePoint | None = None  # the last that was taken
        self.written: ResumePoint | None = None  # the last that is on the disk
        self._warned = False
        self._lock: int | None = None

    # --------------------------------------------------------------------------------------------- writing

    def begin(self, path: Path) -> None:
        """Write the job, at `path` or the next free name."""
        try:
            self._begin(path)
        except OSError as error:
            self._elsewhere(path, error)

    def take(self, point: "ResumePoint") -> None:
        """Have `point` on the disk before this returns."""
        self.point = point
        if self.path is None:
            return
        try:
            self._write(self.path)
        except OSError as error:
            self._elsewhere(self.path, error)

    def know(self, record: dict[str, Any]) -> None:
        """What the mp4 will say of its making, to be written with the next point."""
        self.job = replace(self.job, record=record)

    def remove(self) -> None:
        """The video is there: the run file goes."""
        if self.path is not None:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:  # the video is there, which is what counts
                self.reporter.warn(
                    f"{self.path} could not be removed ({error.strerror}); nothing needs it any more."
                )
        self.release()
        self.path = None

    def release(self) -> None:
        """Leave the file to another process."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def rescue(self) -> Path | None:
        """The file, brought up to date if it is behind: for a run that has failed. None if there is none."""
        if self.point is not None and self.written is not self.point:
            try:
                if self.path is None:
                    self._begin(Path(self.job.output).with_suffix(RUN_SUFFIX))
                else:
                    self._write(self.path)
            except OSError as error:
                self._elsewhere(self.path or Path(self.job.output).with_suffix(RUN_SUFFIX), error)
        return self.path

    def _begin(self, path: Path) -> None:
        """Claim `path` or the next free name, and write there; OSError, and then nothing is left."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path, lock = _claim(path)
        try:
            self._write(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(lock)
        self.path = path
        self.reporter.run_file(path)

    def _write(self, path: Path) -> None:
        from runtime import whole_file

        output = Path(self.job.output)
        self.job = replace(self.job, beside=path.parent.absolute() == output.parent.absolute())
        content = self._content()
        with ExitStack() as unlocking:
            with whole_file.whole_file(path) as file:
                file.write(content)
                lock = os.dup(file.fileno())
                unlocking.callback(os.close, lock)
                _try_lock(lock)  # the new file, before it has its name
            unlocking.pop_all()
        self._hold(lock)
        self.written = self.point

    def _content(self) -> bytes:
        from safetensors.torch import save  # torch: not before the run has passed its checks

        point, tensors = self.point, {}
        if point is not None:
            tensors = {"latents": point.latents, "generator_state": point.generator_state}
            if point.step < self.job.steps:  # the decode needs no text
                tensors |= {"text_states": point.text_states, "negative_states": point.negative_states}
        step = 0 if point is None else point.step
        metadata = latents_metadata(self.job.record, self.job.model, step) | {
            "format": FORMAT,
            "run": json.dumps({"version": VERSION, **asdict(self.job)}),
        }
        present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        return save(present, metadata)

    def _elsewhere(self, path: Path, error: OSError) -> None:
        """Go on in the temporary directory; if that fails too, say so and go on without."""
        spare = Path(tempfile.gettempdir()) / (Path(self.job.output).stem[:40] + RUN_SUFFIX)
        reason = error.strerror or str(error)
        old = self.path
        if path.parent != spare.parent:
            try:
                self._begin(spare)
            except OSError:
                self.path = old
            else:
                if old is not None:
                    with suppress(OSError):  # it is behind, and no harm
                        old.unlink()
                self._warn_once(f"{path} could not be written ({reason}), so the run is kept in {self.path}.")
                return
        self._warn_once(
            f"the run could not be kept in {path} ({reason}); if it is interrupted, "
            + ("it begins anew." if old is None else f"it goes on from step {self.step}.")
        )

    @property
    def step(self) -> int:
        """Denoise steps that are on the disk."""
        return 0 if self.written is None else self.written.step

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            self.reporter.warn(message)

    def _hold(self, lock: int) -> None:
        self.release()
        self._lock = lock

    # ---------------------------------------------------------------------------------------------- reading

    @classmethod
    def take_over(cls, path: Path) -> "RunFile":
        """Go on with the run of `path`, whose file is this process's now, from its `point`.

        Raises RequestError for another kind of file, and for a run that another process works on.
        """
        from runtime.whole_file import remove_leftovers

        lock = _open_locked(path)
        try:
            saved = read_run(path)
        except BaseException:
            os.close(lock)
            raise
        remove_leftovers(path)
        run = cls(saved.job, Reporter({}))
        run.path, run.point, run.written = path, saved.point, saved.point
        run._hold(lock)
        return run


def in_use(path: Path) -> bool:
    """Whether another process works on the run of `path`."""
    try:
        os.close(_open_locked(path))
    except RequestError:
        return True
    return False


def _claim(path: Path) -> tuple[Path, int]:
    """A new empty file, locked: `path`, or NAME-2, NAME-3 ... where that exists."""
    stem = path.name.removesuffix(RUN_SUFFIX)
    for number in count(1):
        one = path if number == 1 else path.with_name(f"{stem}-{number}{RUN_SUFFIX}")
        try:
            lock = os.open(one, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            continue
        _try_lock(lock)
        return one, lock
    raise AssertionError("numbers do not end")


def _try_lock(descriptor: int) -> bool:
    """Whether the file is this process's now; a file system without locks lets everybody have it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _open_locked(path: Path) -> int:
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}); expected a run file.") from error
    # A run that writes replaces its file: then the lock is on one that has no name any more.
    try:
        current = path.stat().st_ino == os.fstat(lock).st_ino
    except FileNotFoundError:
        current = False
    if not _try_lock(lock) or not current:
        os.close(lock)
        raise RequestError(f"{path} belongs to a run that is working; wait for it, or end it first.")
    return lock


def read_run(path: Path) -> SavedRun:
    """Read a run file, checked field by field; RequestError if it is something else."""
    from safetensors import SafetensorError, safe_open

    expected = "expected a run file, NAME.run.safetensors"
    try:
        if path.stat().st_size == 0:
            raise RequestError(
                f"{path} is empty: its run ended before it had begun; remove it, and make the video anew."
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path} cannot be read ({error}); {expected}.") from error
    if metadata.get("format") != FORMAT:
        raise RequestError(f"{path} is no run file; {expected}.")
    try:
        content = json.loads(metadata.get("run", ""))
    except ValueError:
        content = None
    job = _job(path, content)
    return SavedRun(job, _point(path, job, tensors, metadata.get("step", "")))


def _job(path: Path, content: Any) -> Job:
    from entrypoint.rerun import check_record

    if not isinstance(content, dict) or type(content.get("version")) is not int:
        raise _changed(path, "run", content)
    if content["version"] > VERSION:
        raise RequestError(
            f"{path} is of version {content['version']}; this program reads up to {VERSION}: use the version "
            "that wrote it, or a newer one."
        )
    kinds: list[tuple[tuple[str, ...], tuple[type, ...]]] = [
        (TEXTS, (str,)),
        (OPTIONAL_TEXTS, (str, type(None))),
        (FLAGS, (bool,)),
        (CEILINGS, (float, int, type(None))),
        (TABLES, (dict,)),
    ]
    fields: dict[str, Any] = {}
    for names, types in kinds:
        for name in names:
            value = content.get(name, ABSENT.get(name))
            if type(value) not in types or (name in CEILINGS and value is not None and not value > 0):
                raise _changed(path, name, value)
            fields[name] = value
    check_record(fields["record"], str(path))
    return Job(**fields)


def _point(path: Path, job: Job, tensors: "dict[str, Tensor]", step_text: str) -> "ResumePoint | None":
    import torch

    from runtime.resume import ResumePoint

    step = int(step_text) if step_text.isdecimal() and len(step_text) < 5 else -1
    text, latents, state = (tensors.get(name) for name in ("text_states", "latents", "generator_state"))
    if step == 0 and not tensors:
        return None
    if not 0 <= step <= job.steps or (step < job.steps and text is None):
        raise _changed(path, "step", step_text)
    floating = [tensor for tensor in (text, latents, tensors.get("negative_states")) if tensor is not None]
    if not all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in floating):
        raise RequestError(f"{path} holds numbers that are not finite; make the video anew.")
    if step > 0 and (latents is None or latents.ndim != 4 or state is None or state.dtype != torch.uint8):
        raise _changed(path, "latents", None if latents is None else tuple(latents.shape))
    if text is None:
        text = torch.empty(0, 0)  # a run whose steps are done has none
    return ResumePoint(step, text, tensors.get("negative_states"), latents, state)


def _changed(path: Path, name: str, value: object) -> RequestError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return RequestError(
        f"{path} has {name} {shown}: it was not written by this program, or was changed; make the video anew."
    )
