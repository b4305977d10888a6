"""Latents on disk: the one thing that took long, as a safetensors file that `t2v decode` reads.

Tensor "latents", fp32 (16, T, h, w). Metadata, all strings: "format" ("t2v-latents"), "prompt", "seed",
"model", "fps", "sampler", "step" and "steps" (equal when the denoising was finished). A run file
(`entrypoint.run_file`) has all of these too.
"""

import contextlib
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "t2v-latents"
LATENTS_SUFFIX = ".latents.safetensors"
CHANNELS = 16


@dataclass(frozen=True)
class SavedLatents:
    """A latents file as it was read; metadata that it lacks is "" or None."""

    latents: "Tensor"  # (16, T, h, w) fp32
    prompt: str
    model: str
    seed: int | None
    fps: int | None
    step: int | None
    steps: int | None
    metadata: dict[str, str]


def latents_metadata(record: Mapping[str, Any], model: str, step: int) -> dict[str, str]:
    """What latents after `step` say of themselves; `record` has the fields of the request."""
    told = {name: str(record[name]) for name in ("prompt", "seed", "fps", "sampler", "steps")}
    told |= {"model": model, "step": str(step)}
    # Half a surrogate pair, which a prompt from JSON may have, and some file names, have no UTF-8.
    return {name: text.encode("utf-8", "backslashreplace").decode() for name, text in told.items()}


def save_latents(latents: "Tensor", path: Path, metadata: dict[str, str]) -> Path:
    """Write `latents` (16, T, h, w) beside `path` and rename when whole; OSError if that cannot be done."""
    from safetensors.torch import save  # torch: only once there are latents

    from runtime import whole_file

    content = save({"latents": latents.float().cpu().contiguous()}, {"format": FORMAT, **metadata})
    with whole_file.whole_file(path) as file:
        file.write(content)
    return path


def keep_latents(latents: "Tensor", path: Path, metadata: dict[str, str]) -> Path | None:
    """Save them at `path`, or in the temporary directory if that fails; None if that fails too."""
    places = (path, Path(tempfile.gettempdir()) / path.name)
    for place in places:
        with contextlib.suppress(OSError):  # the caller tells where they are, or that they are lost
            return save_latents(latents, place, metadata)
    return None


def read_latents(path: Path) -> SavedLatents:
    """Read a file of `save_latents`, or the latents of a run file; RequestError if it is something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "latents" not in file.keys():  # noqa: SIM118 - not a mapping
                raise RequestError(_no_latents(path, metadata))
            latents = file.get_tensor("latents")
    except (SafetensorError, OSError) as error:
        raise RequestError(
            f"{path} cannot be read as a latents file ({error}); expected one that --save-latents wrote."
        ) from error
    if (
        latents.ndim != 4
        or latents.shape[0] != CHANNELS
        or 0 in latents.shape
        or not latents.is_floating_point()
    ):
        raise RequestError(
            f"The latents in {path} are {latents.dtype} of shape {tuple(latents.shape)}; expected floating "
            f"point numbers of shape ({CHANNELS}, T, height / 8, width / 8)."
        )
    return SavedLatents(
        latents=latents.float(),
        prompt=metadata.get("prompt", ""),
        model=metadata.get("model", ""),
        seed=_number(metadata.get("seed")),
        fps=_number(metadata.get("fps")),
        step=_number(metadata.get("step")),
        steps=_number(metadata.get("steps")),
        metadata=metadata,
    )


def _no_latents(path: Path, metadata: dict[str, str]) -> str:
    if metadata.get("format") == "t2v-run":
        command = f"t2v resume {shlex.quote(str(path))}"
        return f"The run of {path} has no latents yet; it ended before its first denoise step: {command}"
    return f'{path} holds no tensor "latents"; expected a file that --save-latents wrote.'


def _number(text: str | None) -> int | None:
    """A number of up to 19 digits, which every seed has; None for anything else."""
    return int(text) if text is not None and text.isdecimal() and len(text) <= 19 else None
