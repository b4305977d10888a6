"""`t2v rerun`: a video made again from its own record, and what is not as it was then.

The record is the JSON in the mp4's comment. It comes with the file, so from anyone: every field is checked,
and a directory that it names is only ever read as weights. The same files, versions, kind of device and
number formats give the same frames; whatever differs is told before the run.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from entrypoint.cache import choose_cache
from entrypoint.options import (
    SectionedCommand,
    attention_option,
    cache_option,
    latents_option,
    memory_options,
    model_options,
    output_options,
    talk_options,
)
from runtime.errors import RequestError

if TYPE_CHECKING:
    from entrypoint.generate import Where
    from runtime.request import Request
    from runtime.schema import ModelManifest, Profile

Difference = tuple[str, object, object]  # what, then, now

NUMBERS = ("seed", "height", "width", "frames", "fps", "steps")
TEXTS = ("sampler", "model")
PROMPTS = ("prompt", "negative_prompt")  # their length is checked where all prompts are
OPTIONAL_TEXTS = (
    *("noise_device", "family", "weights", "profile", "device", "gpu"),
    *("dtype", "vae_dtype", "quantization"),
)
OPTIONAL_NUMBERS = ("guidance", "shift")
TABLES = ("files", "versions", "ways")

MAX_TEXT = 4096  # characters of any text but the prompts; a path has no more
WITHOUT_PIXELS = ("python", "safetensors")  # versions that no frame depends on
FILES_NAMED = 3


@dataclass(frozen=True)
class Chosen:
    """What will run: the engine's choice for the machine and the model of the record."""

    profile: "Profile"
    device: str
    manifest: "ModelManifest"
    directory: Path


@click.command(cls=SectionedCommand)
@click.argument("video", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@model_options(default="that of the video")
@attention_option
@memory_options
@cache_option
@output_options
@latents_option
@talk_options
@click.pass_context
def rerun(ctx: click.Context, video: Path, **given: Any) -> None:
    """Make a video again from its own record.

    VIDEO is an mp4 that this program made. What is not as it was (files, versions, device) is told first.
    """
    from entrypoint.generate import Where

    machine = ("model", "weights", "profile", "device", "vram", "ram", "attention")
    names = (*machine, "output", "overwrite", "contact_sheet")
    where = Where(**{name: given[name] for name in names}, cache=choose_cache(given["cache"]))
    # A model set for the whole machine is a default; the video knows which one made it.
    if ctx.get_parameter_source("model") == ParameterSource.ENVIRONMENT:
        where = replace(where, model=None)
    open_choice = {
        name
        for name in ("profile", "device", "attention")
        if ctx.get_parameter_source(name) == ParameterSource.DEFAULT
    }
    repeat(video, where, open_choice, save_latents=given["save_latents"], as_json=given["json"])


def repeat(video: Path, where: "Where", open_choice: set[str], *, save_latents: bool, as_json: bool) -> None:
    """Run the record of `video`; `open_choice`: those of profile, device, attention that nobody asked for.

    Raises RequestError for a record that is none, and whatever `generate` raises.
    """
    from entrypoint.events import emit, tell_warning
    from entrypoint.generate import generate
    from runtime.request import check

    record = read_record(video)
    where = _as_recorded(where, record, open_choice, video)
    request = request_of(record)
    chosen = Chosen(*where.choose())
    check(request, chosen.manifest, chosen.device)  # before the weights' headers are read
    for message in warnings(record, chosen):
        tell_warning(message)
        if as_json:
            emit("warning", message=message)
    if where.output is None:
        where = replace(where, output=video.parent)
    generate(request, where, save_latents=save_latents, as_json=as_json, stem=f"{video.stem}-rerun")


# ------------------------------------------------------------------------------------------- the record


def read_record(video: Path) -> dict[str, Any]:
    """The record of `video`, every field of the right type and a plausible length; RequestError if not."""
    from runtime.video import read_metadata

    record = read_metadata(video)
    if "decoded_from" in record:
        raise RequestError(
            f"{video} was decoded from kept latents, and its record does not say how those were made; "
            "run `t2v decode` on the latents again."
        )
    check_record(record, str(video))
    return record


def check_record(record: dict[str, Any], video: str) -> None:
    """RequestError unless all that a record needs is there and of the right type; `video` names its file."""
    from runtime.video import RECORD_FORMAT

    number = record.get("format", 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise _wrong(video, "format", number, "a number from 1")
    if number > RECORD_FORMAT:
        raise RequestError(
            f"{video} has a record of format {_shown(number)}; this program reads up to {RECORD_FORMAT}: "
            "use the version that made the video, or a newer one."
        )
    absent = [name for name in ("prompt", *NUMBERS, *TEXTS) if name not in record]
    if absent:
        raise RequestError(f"{video} does not say its {absent[0]}; expected a video that this program made.")
    for name, value in record.items():
        _check_field(video, name, value)


def _check_field(video: str, name: str, value: Any) -> None:
    if name in NUMBERS:
        if type(value) is not int or abs(value) >= 2**64:  # bool is an int too
            raise _wrong(video, name, value, "a whole number")
    elif name in OPTIONAL_NUMBERS:
        if type(value) not in (int, float) or not abs(value) < 1e6:
            raise _wrong(video, name, value, "a number")
    elif name in PROMPTS:
        if not isinstance(value, str):
            raise _wrong(video, name, value, "a text")
    elif name in (*TEXTS, *OPTIONAL_TEXTS):
        absent = value is None and name in OPTIONAL_TEXTS
        if not absent and (not isinstance(value, str) or len(value) > MAX_TEXT):
            raise _wrong(video, name, value, "a short text")
    elif name in TABLES and not _is_table(value):
        raise _wrong(video, name, value, "a table of texts")


def _is_table(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(text, str) and len(text) <= MAX_TEXT for text in (*value, *value.values()))


def _wrong(video: str, name: str, value: object, expected: str) -> RequestError:
    return RequestError(
        f"The record of {video} has {name} {_shown(value)}; expected {expected}: "
        "it was not written by this program, or was changed."
    )


def _shown(value: object, most: int = 60) -> str:
    """A value of unknown origin on one line: without control characters, at most `most` characters."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a number of more than 18 digits"
    text = repr(value[: most + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def request_of(record: dict[str, Any]) -> "Request":
    """The request that the record is the answer to; its bounds are checked where all requests are."""
    from runtime.request import Request

    optional = {
        name: record[name] for name in ("guidance", "negative_prompt", "noise_device") if name in record
    }
    return Request(
        prompt=record["prompt"],
        sampler=record["sampler"],
        **{name: record[name] for name in NUMBERS},
        **{name: value for name, value in optional.items() if value is not None},
        accept_nonstandard=True,  # the video is there, so whatever it took was accepted once
    )


# ------------------------------------------------------------------------------- the model and the machine


def _as_recorded(where: "Where", record: dict[str, Any], open_choice: set[str], video: Path) -> "Where":
    """`where` with the record's model, weights, device and profile wherever nobody asked for others."""
    if where.model is None:
        where = replace(where, model=_recorded_model(record, video))
    if "device" in open_choice and record.get("device") == "cpu":
        where = replace(where, device="cpu")
    if "profile" in open_choice and (profile := _recorded_profile(record, where)) is not None:
        where = replace(where, profile=profile)
    if "attention" in open_choice:
        where = replace(where, as_before=record)
    return where


def _recorded_model(record: dict[str, Any], video: Path) -> str:
    """The record's model: a manifest's name, or a directory."""
    from runtime.profiles import DIRECTORY_MODEL, list_manifests

    if record.get("family") == DIRECTORY_MODEL:
        weights = _directory(record.get("weights"))
        if weights is None:
            raise RequestError(
                f"{video} was made with the weights in {_shown(record.get('weights'), 250)}, which is no "
                "directory here; name theirs with --model DIR."
            )
        return str(weights)
    name = record["model"]
    if name not in list_manifests():
        raise RequestError(
            f"{video} was made with the model {_shown(name)}, which this program does not know; name a model "
            "of `t2v models`, or a directory of weights, with --model."
        )
    return name


def _directory(text: str | None) -> Path | None:
    """The absolute directory that the record names, if it is one here."""
    if text is None or not text.startswith("/"):
        return None
    try:
        return Path(text) if Path(text).is_dir() else None
    except OSError:  # a name that is too long, a place that may not be looked into
        return None


def _recorded_profile(record: dict[str, Any], where: "Where") -> str | None:
    """The record's profile, if it ships and this machine has at least the card that it is for."""
    from runtime.device import select_device
    from runtime.profiles import list_profiles, load_profile

    name = record.get("profile")
    if name not in list_profiles():
        return None
    then, (here, device) = load_profile(name), select_device(where.device, load_profile(where.profile))
    if device == "cpu" or then.device == "cpu":
        return name if device == "cpu" and then.device == "cpu" else None
    roomy = then.vram_bytes is None or then.vram_bytes <= (here.vram_bytes or 0)
    able = then.capability is None or then.capability <= (here.capability or (0, 0))
    return name if roomy and able else None


# ---------------------------------------------------------------------------------------- what has changed


def warnings(record: dict[str, Any], chosen: Chosen) -> Iterator[str]:
    """A sentence for each kind of difference between the record and now; none means equal frames."""
    from runtime.loading import open_files
    from runtime.provenance import fingerprints

    yield from changed_settings(record, chosen)
    if "files" not in record:
        yield "the record does not say which files of weights were used; these may be others."
        return
    now = fingerprints(open_files(chosen.manifest, chosen.directory).paths)
    if other := other_files(record["files"], now):
        yield f"not the weights of then, so the video will differ: {named(other)}."


def changed_settings(record: dict[str, Any], chosen: Chosen) -> Iterator[str]:
    """A sentence, if versions, device or number formats are others than those of the record."""
    from runtime.provenance import versions

    changed = [*_settings(record, chosen), *_versions(record.get("versions", {}), versions())]
    if changed:
        listed = ", ".join(f"{what} was {_plain(then)} and is {_plain(now)}" for what, then, now in changed)
        yield f"not as it was, so pixels may differ: {listed}."


def named(files: list[str]) -> str:
    """The first of some files, and how many more there are."""
    more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
    return ", ".join(map(_plain, files[:FILES_NAMED])) + more


def _settings(record: dict[str, Any], chosen: Chosen) -> Iterator[Difference]:
    profile, manifest = chosen.profile, chosen.manifest
    now: dict[str, object] = {
        "model": manifest.name,
        "device": chosen.device.partition(":")[0],  # which of several equal cards does not matter
        "gpu": _gpu(chosen.device),
        "dtype": profile.dtype,
        "vae_dtype": profile.vae.dtype,
        "quantization": manifest.quantization,
        "shift": manifest.sampling.shift,
    }
    for name, value in now.items():
        then = record.get(name)
        if name == "device" and isinstance(then, str):
            then = then.partition(":")[0]
        if name in record and value is not None and then != value:
            yield name.replace("_", " "), then, value
    if record["steps"] != manifest.sampling.steps and manifest.name != record["model"]:
        yield f"steps of {manifest.name}", record["steps"], manifest.sampling.steps


def _gpu(device: str) -> str | None:
    if device == "cpu":
        return None
    import torch

    from runtime.device import confirm_device

    confirm_device(device)
    return torch.cuda.get_device_name(device)


def _versions(then: dict[str, str], now: dict[str, str]) -> Iterator[Difference]:
    for name in [*now, *(name for name in then if name not in now)]:
        if name not in WITHOUT_PIXELS and then.get(name) != now.get(name):
            yield name, then.get(name, "absent"), now.get(name, "absent")


def other_files(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """The names whose contents differ, by digest: files that only have other names are the same."""
    if sorted(then.values()) == sorted(now.values()):
        return []
    known, here = set(then.values()), set(now.values())
    changed = [name for name, digest in now.items() if digest not in known]
    return changed or [name for name, digest in then.items() if digest not in here]


def _plain(value: object) -> str:
    """A value on one line as it is, or quoted if it is anything but plain words."""
    text = str(value) if isinstance(value, (str, float)) else _shown(value)
    return text if re.fullmatch(r"[\w.:+/ -]{1,100}", text) else _shown(text)
