"""Where a video goes: the name that was asked for or a free one, proven writable before anything loads."""

import os
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from entrypoint.latents import LATENTS_SUFFIX
from runtime.errors import OutputError

CONTAINER_OUTPUTS = Path("/outputs")  # the volume of the container image
SLUG_BYTES = 60  # of the 255 that file systems give a name; the seed, a number and a suffix follow
SUFFIX = ".mp4"


@dataclass(frozen=True)
class Target:
    """The video's path, and those of what may lie beside it."""

    path: Path
    overwrite: bool
    explicit: bool  # asked for by name, so that no other name will do

    @property
    def latents(self) -> Path:
        """Where latents are kept: `NAME.latents.safetensors`, or the next free name."""
        return self._beside(LATENTS_SUFFIX)

    @property
    def contact_sheet(self) -> Path:
        """Where the contact sheet goes: `NAME.png`, or the next free name."""
        return self._beside(".png")

    def _beside(self, suffix: str) -> Path:
        path = self.path.with_name(self.path.stem + suffix)
        return path if self.overwrite else free_name(path, suffix)

    def now(self) -> "Target":
        """The same, or with the next free name if another run has taken the name that was chosen here."""
        if self.explicit or self.overwrite:
            return self
        return Target(free_name(self.path, SUFFIX), self.overwrite, self.explicit)


def choose(output: Path | None, stem: str, overwrite: bool) -> Target:
    """Where the video goes; `stem` names it where `output` is None or a directory. Creates the directory.

    Raises OutputError for a path that exists (without `overwrite`), of another format, or not writable.
    """
    from runtime.video import check_output  # av: a tenth of a second that --help need not pay

    try:
        directory = default_directory() if output is None else output.expanduser()
        explicit = output is not None and not directory.is_dir()
        path = directory if explicit else free_name(directory / f"{stem}{SUFFIX}", SUFFIX)
        _refuse_below_a_file(path)
        check_output(path, overwrite)
    except OSError as error:  # a name too long, a directory that may not be looked into
        raise OutputError(
            f"The output {output or stem} cannot be used ({error.strerror}); name another with --output."
        ) from error
    return Target(path, overwrite and explicit, explicit)


def default_directory() -> Path:
    """`/outputs` where it exists and can be written (in the container), otherwise `outputs` here."""
    if CONTAINER_OUTPUTS.is_dir() and os.access(CONTAINER_OUTPUTS, os.W_OK):
        return CONTAINER_OUTPUTS
    return Path("outputs")


def free_name(path: Path, suffix: str) -> Path:
    """`path` itself, or with -2, -3 ... before `suffix`: the first that does not exist."""
    if not path.exists():
        return path
    stem = path.name.removesuffix(suffix)
    numbered = (path.with_name(f"{stem}-{number}{suffix}") for number in count(2))
    return next(other for other in numbered if not other.exists())


def slug(text: str) -> str:
    """Words of `text`, in any script, joined by hyphens up to SLUG_BYTES; `video` if there are none."""
    name = ""
    for word in re.findall(r"[^\W_]+", text.lower()):
        longer = f"{name}-{word}" if name else word
        if len(longer.encode()) > SLUG_BYTES:
            break
        name = longer
    if not name:  # one word longer than a file name may be, as in scripts without spaces
        joined = "".join(re.findall(r"[^\W_]", text.lower()))
        name = joined.encode()[:SLUG_BYTES].decode(errors="ignore")
    return name or "video"


def _refuse_below_a_file(path: Path) -> None:
    parents = [parent for parent in path.absolute().parents if parent.exists()]
    if not parents[0].is_dir():
        raise OutputError(
            f"{parents[0]} is a file, so {path} cannot be created below it; name another --output."
        )
