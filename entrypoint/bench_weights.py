"""Which models the bench measures, and their weights: those that are there, or random ones that it makes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entrypoint import synth
from entrypoint.events import tell
from runtime.bench.sizes import words
from runtime.checkpoint.synth import NOTE_FILE
from runtime.errors import RequestError, WeightsError
from runtime.loading import open_files
from runtime.profiles import DIRECTORY_MODEL, find_model, list_manifests, load_manifest, manifest_of
from runtime.schema import ModelManifest, Profile


def models(name: str, formats: str | None, profile: Profile) -> list[ModelManifest]:
    """The model called `name`, or its family's variants in `formats`; RequestError for unknown ones."""
    manifest = manifest_of(name, profile)
    if formats is None:
        return [manifest]
    if manifest.family == DIRECTORY_MODEL:
        raise RequestError(
            f"--formats chooses among the variants of a named model and --model is the directory {name}: "
            "leave --formats out, or name a model."
        )
    others = (load_manifest(other) for other in list_manifests())
    variants = {str(one.quantization): one for one in others if one.family == manifest.family}
    wanted = words(formats)
    strangers = [form for form in wanted if form not in variants]
    if strangers or not wanted:
        raise RequestError(
            f"--formats is {formats!r}; expected one or more of {', '.join(sorted(variants))}, the variants "
            f"of {manifest.family}, with commas between them."
        )
    return [variants[form] for form in wanted]


@contextmanager
def weights_of(
    manifest: ModelManifest, name: str, profile: Profile, given: Path | None, *, may_make: bool
) -> Iterator[tuple[ModelManifest, Path]]:
    """The model and the directory of its files for the block; random ones are made where there are none.

    They are made in `given` if it `may_make` (someone has just named it), otherwise in a directory that is
    gone afterwards: where a machine keeps its weights, random ones would be taken for them later. Raises
    WeightsError for files that are there and incomplete, OutputError where random ones cannot be written.
    """
    if manifest.family == DIRECTORY_MODEL or manifest.embedded is not None:
        yield find_model(name if manifest.family == DIRECTORY_MODEL else manifest.name, profile)
        return
    directory = None if given is None else given.expanduser()
    if directory is not None and _are_there(manifest, directory):
        yield manifest, directory
    elif directory is not None and may_make:
        _make(manifest, directory)
        yield manifest, directory
    else:
        with tempfile.TemporaryDirectory(prefix="t2v-bench-") as made:
            _make(manifest, Path(made))
            yield manifest, Path(made)


def _are_there(manifest: ModelManifest, directory: Path) -> bool:
    """Whether a model's files are in a directory; WeightsError where something else is."""
    try:
        open_files(manifest, directory)
    except WeightsError:
        empty = not directory.is_dir() or not any(directory.iterdir())
        # Random numbers never go among files that someone has put there.
        if not empty and not (directory / NOTE_FILE).exists():
            raise
        return False
    return True


def _make(manifest: ModelManifest, directory: Path) -> None:
    tell(f"random weights of {manifest.name} for the measurement, in {directory}")
    synth.write(manifest, directory, as_json=False)
