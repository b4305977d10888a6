"""Making of a planned checkpoint, once and for all: checked first, file by file, and able to go on.

It needs the memory of one tensor. Files appear under their names whole. A block layout keeps a record of its
finished files in TARGET/.convert.json until all are there: after a kill the same command finds them, compares
source, settings and digests, and makes the rest. A lone file begins anew. The bytes depend on the values of
the source and on the settings: not on its layout, nor on the number of threads.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.checkpoint.checkpoint import open_checkpoint
from runtime.checkpoint.conversion import Conversion
from runtime.checkpoint.convert import (
    CONFIG_FILE,
    INDEX_FILE,
    reader,
    write_config,
    write_file,
    write_index,
)
from runtime.checkpoint.families import WANTED, family, read_config
from runtime.checkpoint.files import SAFETENSORS_SUFFIX, read_header
from runtime.checkpoint.layouts import BLOCK_FILE, NON_BLOCK_FILE
from runtime.checkpoint.report import LayerError
from runtime.checkpoint.write import part_name, scratch_name, telling, write_json
from runtime.errors import OutputError
from runtime.provenance import fingerprint

STATE_FILE = ".convert.json"
FORMAT = 1  # of what is written; files of another one are not gone on with
_SPARE_BYTES = 1 << 20  # index, config and record


@dataclass(frozen=True)
class Made:
    """A finished file: its size and digest, and the errors of its matrices."""

    bytes: int
    sha256: str
    layers: tuple[LayerError, ...]


@dataclass(frozen=True)
class Outcome:
    """A finished conversion: its files by name, and how many were there from an earlier, broken run."""

    files: dict[str, Made]
    kept: int

    @property
    def layers(self) -> list[LayerError]:
        """The error of every block matrix, in the order of the blocks."""
        return [layer for made in self.files.values() for layer in made.layers]


def convert(
    plan: Conversion,
    *,
    overwrite: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Outcome:
    """Make the files of `plan`. Memory: one tensor (a .pth too; it needs its size on disk twice).

    on_start(total, kept): bytes of weights that will be read, and files kept from a run that was broken off;
    on_bytes(n) after each tensor. Raises OutputError for output that exists, another conversion at work there
    or too little space; WeightsError for a damaged source.
    """
    with _claimed(plan.target):
        settings = _settings(plan) if plan.layout == "blocks" else {}
        made = _unfinished(plan, settings)
        _check_target(plan, overwrite=overwrite, resuming=made is not None)
        _check_space(plan, made or {}, overwrite=overwrite)
        if made is None:
            made = {}
            _clear(plan)
        if on_start is not None:
            todo = [name for name in plan.files if name not in made]
            on_start(sum(plan.source_bytes(name) for name in todo), len(made))
        kept = len(made)
        if plan.recipe.kind == "transformer":
            _write_config(plan)
        for name in plan.files:
            if name not in made:
                if plan.layout == "blocks":  # before the first file too: what is there is ours
                    _record(plan, settings, made)
                made[name] = _make(plan, name, on_bytes)
        return _finish(plan, Outcome({name: made[name] for name in plan.files}, kept))


@contextmanager
def _claimed(target: Path) -> Iterator[None]:
    """Holds `target` against other conversions; the lock goes with the process, however that ends."""
    path = target.with_name(f".{target.name}.convert.lock")
    with telling(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise BlockingIOError  # that which held it has just removed it
        except BlockingIOError as error:
            raise OutputError(
                f"Another conversion is writing {target}; wait for it or choose another place."
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _settings(plan: Conversion) -> dict[str, Any]:
    """What must be the same for finished files to be kept."""
    recipe = plan.recipe
    source = {}
    for file in plan.source.files:
        stat = file.stat()
        source[file.name] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "is": fingerprint(file)}
    how = {"kind": recipe.kind, "to": recipe.quantization, "scale_dtype": str(recipe.scale_dtype)}
    return {"format": FORMAT, **how, "other_dtype": str(recipe.other_dtype), "source": source}


def _unfinished(plan: Conversion, settings: dict[str, Any]) -> dict[str, Made] | None:
    """The finished files of a broken run of this very conversion; None if there was none."""
    path = plan.target / STATE_FILE
    if plan.layout != "blocks" or not path.is_file():
        return None
    try:
        state = json.loads(path.read_text("utf-8"))
        if not isinstance(state, dict) or state.get("settings") != settings:
            return None
        entries = {name: state["files"][name] for name in plan.files if name in state["files"]}
        made = {
            name: Made(entry["bytes"], entry["sha256"], tuple(map(LayerError.restored, entry["layers"])))
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # a record that cannot be read is no record: what lies there is then refused as foreign
    return {name: one for name, one in made.items() if _is_whole(plan.target / name, one)}


def _is_whole(path: Path, made: Made) -> bool:
    if not path.is_file() or path.stat().st_size != made.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == made.sha256


def _record(plan: Conversion, settings: dict[str, Any], made: dict[str, Made]) -> None:
    state = {"settings": settings, "files": {name: asdict(one) for name, one in made.items()}}
    write_json(plan.target / STATE_FILE, state)


def _check_target(plan: Conversion, *, overwrite: bool, resuming: bool) -> None:
    """OutputError for what may not be there: earlier output, another model's files or config."""
    target = plan.target
    if plan.layout == "blocks":
        _check_directory(target, overwrite=overwrite or resuming)
    elif target.is_dir():
        raise OutputError(f"{target} is a directory; expected the name of a file.")
    elif target.exists() and not overwrite:
        raise OutputError(f"{target} exists already; choose another name or add --overwrite.")
    if plan.recipe.kind == "transformer" and not _config_agrees(plan):
        config = _config_place(plan) / CONFIG_FILE
        if plan.layout != "blocks" or not overwrite:
            raise OutputError(f"{config} is of another model; choose another place.")
        with telling(target):
            config.unlink()


def _check_directory(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; expected a new directory for the blocks.")
    present = sorted(target.iterdir()) if target.is_dir() else []
    ours = [path for path in present if _is_of_a_set(path)]
    strangers = [path for path in present if path.suffix == SAFETENSORS_SUFFIX and path not in ours]
    for path in strangers:
        if family(read_header(path)) == WANTED["transformer"]:
            raise OutputError(f"{target} holds another transformer ({path.name}); choose another place.")
    if ours and not overwrite:
        unfinished = (target / STATE_FILE).exists()
        what = "an unfinished conversion of another source or with other settings" if unfinished else ""
        raise OutputError(
            f"{target} holds {what or ours[0].name} already; choose another place or add --overwrite."
        )


def _is_of_a_set(path: Path) -> bool:
    """Whether a file belongs to a block layout (of any number of blocks)."""
    return bool(BLOCK_FILE.fullmatch(path.name)) or path.name in (NON_BLOCK_FILE, INDEX_FILE, STATE_FILE)


def _clear(plan: Conversion) -> None:
    """Remove what the new files replace, all at once: old and new blocks must never make up one model."""
    if plan.layout == "blocks" and plan.target.is_dir():
        with telling(plan.target):
            for path in sorted(filter(_is_of_a_set, plan.target.iterdir()), reverse=True):
                path.unlink()


def _check_space(plan: Conversion, made: dict[str, Made], *, overwrite: bool) -> None:
    """OutputError unless what is still to be made fits the file system; leftovers of a kill go first."""
    needed = sum(plan.size_of(name) for name in plan.files if name not in made) + _SPARE_BYTES
    needed *= 2 if plan.layout == "pickle" else 1
    with telling(plan.target):
        for name in plan.files:
            part_name(plan.path_of(name)).unlink(missing_ok=True)
            scratch_name(plan.path_of(name)).unlink(missing_ok=True)
        place = plan.target if plan.target.is_dir() else plan.target.parent
        free = shutil.disk_usage(place).free
        if plan.layout == "blocks" and plan.target.is_dir():
            stay = {plan.target / name for name in made}
            free += sum(p.stat().st_size for p in plan.target.iterdir() if _is_of_a_set(p) and p not in stay)
    if needed > free:
        raise OutputError(
            f"{plan.target} needs {needed / 2**30:.2f} GiB and {place} has {free / 2**30:.2f} GiB free; "
            "make room or choose another place."
        )


def _config_place(plan: Conversion) -> Path:
    return plan.target if plan.layout == "blocks" else plan.target.parent


def _config_agrees(plan: Conversion) -> bool:
    """Whether the config.json that is there, if any, says nothing else than the source."""
    sizes = plan.source.sizes()
    said = read_config("transformer", plan.target if plan.layout == "single" else _config_place(plan))
    return all(sizes.get(key, value) == value for key, value in said.items())


def _write_config(plan: Conversion) -> None:
    place = _config_place(plan)
    if not (place / CONFIG_FILE).exists():
        write_config(place, plan.source.sizes())


def _make(plan: Conversion, name: str, on_bytes: Callable[[int], None] | None) -> Made:
    """Write one file of the plan."""
    path, digest = plan.path_of(name), hashlib.sha256()
    layers: list[LayerError] = []

    def on_tensor(tensor: str, layer: LayerError | None) -> None:
        if layer is not None:
            layers.append(layer)
        if on_bytes is not None:
            on_bytes(plan.source.tensors[tensor].nbytes)

    nbytes = write_file(path, plan.files[name], reader(plan.source), plan.recipe, on_tensor, digest.update)
    if plan.layout == "pickle":  # written by torch, so read again
        with path.open("rb") as file:
            return Made(nbytes, hashlib.file_digest(file, "sha256").hexdigest(), tuple(layers))
    return Made(nbytes, digest.hexdigest(), tuple(layers))


def _finish(plan: Conversion, outcome: Outcome) -> Outcome:
    """The index, a look at the result's headers, and the end of the record."""
    if plan.layout == "blocks":
        write_index(plan.target, plan.files, sum(made.bytes for made in outcome.files.values()))
    result = open_checkpoint(plan.target, plan.recipe.kind)
    sizes, expected = result.sizes(), plan.source.sizes()
    same = all(sizes[key] == expected[key] for key in sizes.keys() & expected.keys())
    if not same or result.quantization != plan.recipe.quantization:
        raise RuntimeError(f"{plan.target} became {result.quantization} of {sizes}, not of {expected}")
    if plan.layout == "blocks":
        with telling(plan.target):
            (plan.target / STATE_FILE).unlink(missing_ok=True)
    return outcome
