"""A checkpoint of random numbers in a model's published layout, to run the whole program without a download.

Names, shapes, dtypes and files are those that the manifest's repository has; the numbers are noise of a scale
at which activations stay near one. So times and memory are those of the real model, and the video is noise.
Files get their names when they are whole, and a note in the directory says what lies there.
"""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.checkpoint.archive import holds, write_archive
from runtime.checkpoint.convert import CONFIG_FILE, write_config, write_index
from runtime.checkpoint.files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX, read_header
from runtime.checkpoint.noise import FORMAT, Noise
from runtime.checkpoint.published import SynthPlan
from runtime.checkpoint.write import part_name, telling, write_json, write_safetensors
from runtime.errors import OutputError, WeightsError

NOTE_FILE = "synthetic.json"
"""Lies in the directory: what there is made up, and by what."""

WORKERS = 4  # files at a time; each holds a tensor or two, of at most 141 MB in a block
_SPARE_BYTES = 1 << 20  # for notes, index and config
_WEIGHT_SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES, ".gguf")


class _Stopped(Exception):
    """Another file failed, or the user wants no more."""


@dataclass(frozen=True)
class Synthesized:
    """What was made: weight files by path and size, those of an earlier run among them."""

    files: Mapping[str, int]
    kept: tuple[str, ...]


def synthesize(
    plan: SynthPlan,
    directory: Path,
    *,
    tokenizer: Path,
    seed: int = 0,
    workers: int = WORKERS,
    on_start: Callable[[int, int], None] = lambda missing, files: None,
    on_bytes: Callable[[int], None] = lambda count: None,
    on_file: Callable[[], None] = lambda: None,
) -> Synthesized:
    """Write the files of `plan` below `directory`; whole files of an earlier run with this seed are kept.

    tokenizer: a tokenizer.json to put where the layout has one. on_start(bytes, files): what is still to be
    made; on_bytes and on_file are called from several threads. Memory: the table, and a tensor or two for
    each worker; of a .pth a piece. Raises OutputError for a directory that holds other weights, another run
    at work there, too little space, or a file that cannot be written.
    """
    with telling(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _claimed(directory):
        _check_strangers(plan, directory, seed)
        kept = tuple(path for path in plan.files if _is_whole(directory / path, plan.files[path].holds))
        todo = sorted((path for path in plan.files if path not in kept), key=plan.size_of, reverse=True)
        _check_space(plan, directory, todo)
        _write_note(plan, directory, seed)
        on_start(sum(map(plan.size_of, todo)), len(todo))
        _write_companions(plan, directory, tokenizer)
        _make_all(plan, directory, todo, Noise(seed) if todo else None, workers, on_bytes, on_file)
        made = {path: (directory / path).stat().st_size for path in plan.files}
        for place in plan.indexed:
            own = [path for path in made if _folder(path) == place and path.endswith(SAFETENSORS_SUFFIX)]
            files = {path.rpartition("/")[2]: plan.files[path] for path in own}
            write_index(directory / place, files, sum(made[path] for path in own))
        return Synthesized(made, kept)


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _write_companions(plan: SynthPlan, directory: Path, tokenizer: Path) -> None:
    """config.json and tokenizer.json, where the layout has them and the directory does not yet."""
    for place, sizes in plan.configs.items():
        if not (directory / place / CONFIG_FILE).exists():
            write_config(directory / place, sizes)
    if plan.tokenizer is not None and not (directory / plan.tokenizer).exists():
        _copy(tokenizer, directory / plan.tokenizer)


def _make_all(
    plan: SynthPlan,
    directory: Path,
    todo: Iterable[str],
    noise: Noise | None,
    workers: int,
    on_bytes: Callable[[int], None],
    on_file: Callable[[], None],
) -> None:
    """Write several files at a time; the first that fails, or an interrupt, stops the others."""
    if noise is None:
        return
    stop = threading.Event()

    def count(nbytes: int) -> None:
        if stop.is_set():
            raise _Stopped
        on_bytes(nbytes)

    def make(path: str) -> None:
        count(0)
        _make(directory / path, plan.files[path].holds, plan.files[path].extra, noise, count)
        on_file()

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(make, path) for path in todo]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:
            stop.set()
            for future in running:
                future.cancel()
            raise


def _make(
    path: Path,
    held: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
    noise: Noise,
    on_bytes: Callable[[int], None],
) -> None:
    """Write one file, whole or not at all."""
    if path.suffix == SAFETENSORS_SUFFIX:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, like in held.items():
                yield name, extra[name] if name in extra else noise.tensor(name, like, held)

        write_safetensors(path, held, tensors(), lambda data: on_bytes(data.nbytes))
        return

    def pieces(name: str, like: Tensor) -> Iterator[Tensor]:
        for piece in noise.pieces(name, like, held):
            yield piece
            on_bytes(piece.nbytes)

    write_archive(path, held, pieces)


# ----------------------------------------------------------------------------------------------------- checks


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Holds `directory` against other runs; the lock goes with the process, however that ends."""
    with telling(directory):
        handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"Another run is writing weights into {directory}; wait for it or choose another place."
            ) from error
        yield
    finally:
        os.close(handle)


def _check_strangers(plan: SynthPlan, directory: Path, seed: int) -> None:
    """OutputError for weights that are not ours: random numbers must never lie among real ones."""
    noted = _note(directory)
    if noted is not None and noted["seed"] != seed:
        raise OutputError(
            f"{directory} holds random weights of seed {noted['seed']}; choose another place, or "
            f"--seed {noted['seed']} to add to them."
        )
    ours = set() if noted is None else set(noted["files"])
    places = {"", *map(_folder, plan.files)}
    for place in sorted(places):
        folder = directory / place
        with telling(folder):
            found = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in found:
            name = f"{place}/{path.name}" if place else path.name
            if path.suffix in _WEIGHT_SUFFIXES and not path.name.startswith(".") and name not in ours:
                raise OutputError(
                    f"{directory} holds weights that were not made here ({name}); choose an empty directory "
                    "for random ones."
                )
    for path_name, held in plan.files.items():
        target = directory / path_name
        if target.exists() and not _is_whole(target, held.holds):
            raise OutputError(
                f"{target} is not what would be written there; remove it or choose another directory."
            )


def _note(directory: Path) -> dict[str, Any] | None:
    """What the note in a directory says; None where there is none. OutputError for one that is not ours."""
    path = directory / NOTE_FILE
    if not path.exists():
        return None
    try:
        note = json.loads(path.read_text("utf-8"))
        sound = note["format"] == FORMAT and type(note["seed"]) is int and isinstance(note["files"], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise OutputError(f"{path} is not the note of this program; choose another directory.")
    assert isinstance(note, dict)
    return note


def _write_note(plan: SynthPlan, directory: Path, seed: int) -> None:
    noted = _note(directory) or {"models": [], "files": []}
    write_json(
        directory / NOTE_FILE,
        {
            "about": "These weights are random numbers: they show speed and memory, and no video.",
            "format": FORMAT,
            "seed": seed,
            "models": sorted({*noted["models"], plan.model}),
            "files": sorted({*noted["files"], *plan.files}),
        },
    )


def _is_whole(path: Path, held: Mapping[str, Tensor]) -> bool:
    """Whether a file is there that holds these tensors; files get their names only when they are whole."""
    if not path.is_file():
        return False
    if path.suffix != SAFETENSORS_SUFFIX:
        return holds(path, held)
    try:
        found = read_header(path)
    except WeightsError:
        return False
    return {name: (info.dtype, info.shape) for name, info in found.items()} == {
        name: (like.dtype, tuple(like.shape)) for name, like in held.items()
    }


def _check_space(plan: SynthPlan, directory: Path, todo: Iterable[str]) -> None:
    """OutputError unless what is still to be made fits the disk; what a killed run left half goes first."""
    with telling(directory):
        for path in plan.files:
            part_name(directory / path).unlink(missing_ok=True)
        free = shutil.disk_usage(directory).free
    needed = sum(map(plan.size_of, todo)) + _SPARE_BYTES
    if needed > free:
        raise OutputError(
            f"{plan.model} needs {needed / 1e9:.1f} GB in {directory}, where {free / 1e9:.1f} GB are free; "
            "make room, choose another place, or name fewer --parts."
        )


def _copy(source: Path, target: Path) -> None:
    with telling(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_name(target)
        shutil.copyfile(source, part)
        part.replace(target)
